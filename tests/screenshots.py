"""Pictures of what a person sees in Prefect's UI, of a real run on a local stack, by a headless browser: `make screenshots`.

    python tests/screenshots.py [--out docs] [--config deployments/configs/quickstart.yaml]

Needs Chromium (`apt install chromium`). A run is looked at while PPO trains, its process is then killed, and it is looked at again
when the server has started it anew and it has finished. Each picture is checked to hold the words that it is about and to have
nothing that reaches beyond its page.
"""

import argparse
import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.asyncio.client import ClientConnection, connect

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "slow")]

from stacked import Stacked, free_port, kill, wait  # noqa: E402

WIDTH = 1360
SECONDS = 60  # for a page to show what it is about
CALL_SECONDS = 10
COLOURS = 96  # of a picture, to keep it small
QUICKSTART = ROOT / "deployments" / "configs" / "quickstart.yaml"


class Browser:
    """A headless Chromium; a context manager."""

    def __init__(self) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            sys.exit("error: no Chromium on the PATH; install it: apt install chromium")
        self._port, self._folder = free_port(), tempfile.TemporaryDirectory()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        place = [f"--remote-debugging-port={self._port}", f"--user-data-dir={self._folder.name}"]
        self._process = subprocess.Popen(
            [program, *options, *place, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> "Browser":
        wait(self._answers, lambda: "the browser does not answer", SECONDS)
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        with suppress(OSError):
            self._folder.cleanup()

    def _answers(self) -> bool:
        try:
            self._ask("version")
        except OSError:
            return False
        return True

    def _ask(self, what: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/{what}", method=method)
        with urllib.request.urlopen(request, timeout=CALL_SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text.startswith((b"{", b"[")) else None

    def picture(self, url: str, path: Path, words: tuple[str, ...], height: int, prepare: str = "") -> None:
        """A picture of a page, once it shows all `words`, as tall as its content but at most `height`.

        RuntimeError: it does not show them, or something in it is wider than the page.
        """
        tab = self._ask("new?about:blank", "PUT")  # a tab that is used again may hang as it is resized
        try:
            asyncio.run(self._picture(tab["webSocketDebuggerUrl"], url, path, words, height, prepare))
        finally:
            self._ask(f"close/{tab['id']}")

    async def _picture(self, tab: str, url: str, path: Path, words: tuple[str, ...], height: int, prepare: str) -> None:
        async with connect(tab, max_size=1 << 26) as socket:
            page = Page(socket)
            size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
            await page.call("Emulation.setDeviceMetricsOverride", **size)
            await page.call("Page.navigate", url=url)
            missing: list[str] = list(words)
            for _ in range(SECONDS * 2):
                await asyncio.sleep(0.5)
                with suppress(TimeoutError):  # a question that a page takes along as it goes is not answered
                    text = await page.value("document.body ? document.body.innerText : ''")
                    missing = [word for word in words if word.lower() not in str(text).lower()]
                if not missing:
                    break
            if missing:
                raise RuntimeError(f"{url} does not show {missing}")
            if prepare:
                await page.value(prepare)
            await asyncio.sleep(3)  # graphs are drawn and images loaded
            wide = await page.value("document.documentElement.scrollWidth")
            if wide > WIDTH:
                raise RuntimeError(f"{url} is {wide} px wide in a window of {WIDTH}")
            shot = await page.call("Page.captureScreenshot", format="png")
        picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path} {path.stat().st_size / 1000:.0f} kB", flush=True)


class Page:
    """One tab, by Chromium's debugging protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0

    async def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        await self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            answer = json.loads(await asyncio.wait_for(self._socket.recv(), CALL_SECONDS))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    async def value(self, script: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")


def artifact(stacked: Stacked, run: str, key: str) -> str:
    """The id of a run's newest artifact of a key."""
    return {found["key"]: found["id"] for found in stacked.artifacts(run)}[key]


def take(stacked: Stacked, browser: Browser, config: Path, out: Path) -> None:
    """All pictures."""
    ui = stacked.stack.api().removesuffix("/api")

    def shoot(name: str, path: str, *words: str, height: int = 1000, prepare: str = "") -> None:
        browser.picture(f"{ui}{path}", out / f"{name}.png", words, height, prepare)

    def soon(what: Callable[[], bool]) -> None:
        wait(what, lambda: f"{stacked.state(run)}: {stacked.message(run)}", 1800)

    pipeline = stacked.deployment("rlhf/pipeline")
    steps = "ppo.steps=240"  # enough for a report with curves before it ends, on a quick machine too
    body = {"parameters": {"config_file": str(config), "overrides": [steps]}, "state": {"type": "SCHEDULED"}}
    run = stacked.call("POST", f"/deployments/{pipeline}/create_flow_run", body)["id"]
    shoot("deployments", "/deployments", "pipeline", "evaluate", height=720)
    shoot("form", f"/deployments/deployment/{pipeline}/run", "config", "force", height=1500)
    soon(lambda: has_curves(stacked, run))
    shoot("live-run", f"/runs/flow-run/{run}", "ppo", "running", height=900)
    shoot(
        "live-report", f"/artifacts/artifact/{artifact(stacked, run, 'rlhf-report')}", "lineage", "running", height=664
    )
    stage = artifact(stacked, run, "rlhf-ppo-report")
    shoot("stage-report", f"/artifacts/artifact/{stage}", "curves", "checkpoints", "answers", height=1500)
    kill(*stacked.stack.runs())
    soon(lambda: stacked.state(run) == "Completed")
    report = artifact(stacked, run, "rlhf-report")
    shoot("resumed-report", f"/artifacts/artifact/{report}", "lineage", "resumed from", height=1000)
    shoot("resumed-run", f"/runs/flow-run/{run}", "completed", height=900)
    grid = ("--set", "ppo.steps=20", "--grid", "ppo.kl_coef=0.02,0.2,1")
    said = stacked.rlhf("sweep", str(config), *grid, seconds=1800)
    page = next(line.split()[-1] for line in said.splitlines() if line.startswith("report "))
    browser.picture(f"file://{page}", out / "sweep.png", ("ppo.kl_coef=0.2", "KL and reward"), 1900)


def has_curves(stacked: Stacked, run: str) -> bool:
    """Whether PPO's report has curves and a checkpoint by now; RuntimeError if it has ended before."""
    if stacked.state(run) in ("Completed", "Failed"):
        raise RuntimeError(f"{stacked.state(run)} before the report had curves: {stacked.message(run)}")
    texts = [found["data"] for found in stacked.artifacts(run) if found["key"] == "rlhf-ppo-report"]
    return any("## Curves" in text and "## Checkpoints" in text and "## Answers" in text for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        stacked = Stacked(Path(folder))
        try:
            stacked.rlhf("up", str(asked.config), "--port", str(free_port()))
            take(stacked, browser, asked.config.absolute(), asked.out)
        finally:
            stacked.rlhf("down")
            kill(*stacked.stack.processes())


if __name__ == "__main__":
    main()
