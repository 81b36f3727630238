"""Run in a network namespace of its own: a stack in it, one run, and whatever wants to go out. Prints JSON.

The namespace has a default route to nowhere, so a packet for anybody outside is sent, and seen here; the last one is sent on
purpose, to show that it would be.
"""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from stacked import CONFIG, Stacked

ADDRESS = re.compile(r"""(?:src|href)=["']([^"']+)""")


def make_network() -> None:
    for words in (
        "link set lo up",
        "link add out type veth peer name nowhere",
        "addr add 10.99.0.1/24 dev out",
        "link set out up",
        "link set nowhere up",
        "route add default via 10.99.0.2",
    ):
        subprocess.run(["ip", *words.split()], check=True)


def listen(seen: list[str]) -> None:
    """Note every IPv4 packet that leaves, and every question who would take one."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
    wire.bind(("out", 0))
    while frame := wire.recv(2048):
        if frame[12:14] in (b"\x08\x00", b"\x08\x06"):
            seen.append(frame.hex()[:80])


def assets(url: str) -> dict[str, int]:
    """Scripts and styles that the first page of the UI loads: for each address the status."""
    page = urllib.request.urlopen(url, timeout=30).read().decode()
    found = {}
    for address in ADDRESS.findall(page):
        if "//" in address:
            found[address] = -1  # of somebody else
        elif address.endswith((".js", ".css")):
            found[address] = urllib.request.urlopen(f"{url}{address}", timeout=30).status
    return found


def main() -> None:
    make_network()
    seen: list[str] = []
    threading.Thread(target=listen, args=(seen,), daemon=True).start()
    stacked = Stacked(Path(sys.argv[1]))
    try:
        stacked.rlhf("up", str(CONFIG))
        url = str(stacked.stack.api()).removesuffix("/api")
        run = stacked.start(deployment="rlhf-data/data")
        stacked.wait_for_state(run, "Completed", "Failed", "Crashed")
        result = {"run": stacked.state(run), "assets": assets(url)}
    finally:
        stacked.rlhf("down")
    time.sleep(1)
    went_out = list(seen)
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("192.0.2.1", 9))
    time.sleep(1)
    print(json.dumps({**result, "went_out": went_out, "would_be_seen": len(seen) > len(went_out)}))


if __name__ == "__main__":
    main()
