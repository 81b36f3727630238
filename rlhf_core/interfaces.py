"""Addresses of this machine and the interfaces they are on, from the kernel: no tool that may not be installed is asked.

Nodes tell each other where they can be reached, and gloo and NCCL must be told which interface leads there. Addresses that mean
something on one link only, and the loopback, are of no use to others.
"""

import fcntl
import socket
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

SIOCGIFCONF, SIOCGIFFLAGS, IFF_UP, IFF_LOOPBACK = 0x8912, 0x8913, 0x1, 0x8


def addresses() -> tuple[str, ...]:
    """Addresses by which other machines may reach this one; those of real devices first, those of bridges last."""

    def order(name: str) -> int:
        place = Path("/sys/class/net") / name
        return 0 if (place / "device").exists() else 2 if (place / "bridge").exists() else 1

    found = [(order(name), address) for name, address, loopback in _interfaces() if not loopback]
    return tuple(address for _, address in sorted(found, key=lambda pair: pair[0]))


def interface_of(address: str) -> str | None:
    """The interface of this machine on the way to an address or name, or that has it; None if there is no way."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing, but settles the way
            own = probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None
    return next((name for name, found, _ in _interfaces() if found == own), None)


def _interfaces() -> Iterator[tuple[str, str, bool]]:
    """(interface, address, whether it is the loopback) of all that are up; IPv6 without addresses of one link alone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:

        def flags(name: str) -> int:
            answer = fcntl.ioctl(probe, SIOCGIFFLAGS, struct.pack("16s240x", name.encode()))
            return int(struct.unpack_from("H", answer, 16)[0])

        size = struct.calcsize("16s24x")
        room = array("B", bytes(size * 512))
        place, _ = room.buffer_info()
        filled = struct.unpack("iL", fcntl.ioctl(probe, SIOCGIFCONF, struct.pack("iL", len(room), place)))[0]
        for start in range(0, filled, size):
            name = room[start : start + 16].tobytes().split(b"\0")[0].decode()
            base = name.partition(":")[0]
            if flags(base) & IFF_UP:
                yield base, socket.inet_ntoa(bytes(room[start + 20 : start + 24])), bool(flags(base) & IFF_LOOPBACK)
        try:
            rows = Path("/proc/net/if_inet6").read_text().splitlines()
        except OSError:
            rows = []  # no IPv6
        for row in rows:
            digits, _, _, scope, _, name = row.split()
            if scope != "20" and flags(name) & IFF_UP:
                yield name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), bool(flags(name) & IFF_LOOPBACK)
