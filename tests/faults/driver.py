"""One stage built by a process of its own, which the fault tests kill: `driver.py CONFIG STAGE [key=value …]`.

The control plane without Prefect: plans the stage, calls `build_stage`, prints every progress event as a JSON line, then
{"how": …}, so that a test can time what it does. Ends with the code of its error; takes SIGTERM as `rlhf run` does.
"""

import json
import signal
import sys
from typing import Any

from flows.selection import plan_single
from rlhf_core.config import load_config
from rlhf_core.errors import ExitCode, RlhfError
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.stage import build_stage


class Terminated(BaseException):
    """SIGTERM."""


def terminate(*_: object) -> None:
    raise Terminated


def tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def main(config: str, stage: StageName, *overrides: str) -> int:
    signal.signal(signal.SIGTERM, terminate)
    try:
        loaded = load_config(config, overrides)
        store = Store(loaded.store)
        built = build_stage(store, loaded, plan_single(loaded, stage, store), on_event=tell)
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    except Terminated:
        return ExitCode.PREEMPTED
    tell({"how": built.how})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # pyright: ignore[reportArgumentType]
