"""Devices: what their makers publish of memory, dense peak and bandwidth, and what fraction of it this work reaches.

A peak is the data sheet's dense tensor figure in 16 bit and the plain one in fp32, bandwidth and memory likewise; no price is
known here, as prices are not the maker's to tell. The fractions are three, the same for all devices and models, and come from
published measurements on A100s and one H100; `tests/benchmarks/planner_published.py` says how well they do, cell by cell.
"""

import re
from dataclasses import dataclass, replace

from rlhf_core.errors import ConfigError

GIB = 1 << 30
TRAINING = 0.25  # of the peak: median of DeepSpeed-Chat's six published training rates, by the operations counted here
READING = 0.38  # of the bandwidth in a decode step: fitted to its six generation rates and eight times on one GPU
LAUNCH = 0.21e-3  # seconds a layer takes at least: 5.0 ms for 24 layers, whatever the batch (DeepSpeed's hybrid engine, H100)
USABLE = 0.92  # of a device's memory; the rest is the runtime's own and what its allocator cannot use


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind.

    Attributes:
        name: as the user gave it.
        memory: bytes of one device.
        tflops: dense peak in 16 bit, 1e12 operations a second.
        tflops_fp32: the same in fp32.
        bandwidth: of its memory, 1e9 bytes a second.
        link: to the other devices of its node, each way, 1e9 bytes a second.
        network: of one device's share to other nodes, each way, 1e9 bytes a second.
        devices: in a node.
        nodes: how many.
    """

    name: str
    memory: float
    tflops: float
    tflops_fp32: float
    bandwidth: float
    link: float
    network: float = 25.0
    devices: int = 1
    nodes: int = 1

    @property
    def world(self) -> int:
        """Devices, and so ranks, in all."""
        return self.devices * self.nodes

    @property
    def cpu(self) -> bool:
        """Whether it is no GPU: memory is the machine's, and a rollout keeps a copy of the weights."""
        return self.name == "cpu"

    @property
    def usable(self) -> float:
        """Bytes of one device that a rank may fill."""
        return self.memory * USABLE

    def peak(self, precision: str) -> float:
        """Operations a second."""
        return 1e12 * (self.tflops_fp32 if precision == "fp32" else self.tflops)

    @property
    def between(self) -> float:
        """Bytes a second that one rank exchanges with all others: the slowest way among them."""
        return 1e9 * (self.network if self.nodes > 1 else self.link)


# memory GiB, dense fp16/bf16 TFLOPs, fp32 TFLOPs, GB/s, GB/s to neighbours (NVLink or PCIe): the makers' data sheets.
_SHEETS: dict[str, tuple[float, float, float, float, float]] = {
    "v100-16g": (16, 125, 15.7, 900, 150),
    "v100-32g": (32, 125, 15.7, 900, 150),
    "t4": (16, 65, 8.1, 320, 16),
    "a10": (24, 125, 31.2, 600, 32),
    "a6000": (48, 154.8, 38.7, 768, 32),
    "a100-40g": (40, 312, 19.5, 1555, 300),
    "a100-80g": (80, 312, 19.5, 2039, 300),
    "l4": (24, 121, 30.3, 300, 32),
    "l40s": (48, 362, 91.6, 864, 32),
    "rtx4090": (24, 165, 82.6, 1008, 32),
    "h100-80g": (80, 989, 67, 3350, 450),
    "h200": (141, 989, 67, 4800, 450),
}
KNOWN = {name: Hardware(name, m * GIB, t, f, b, link) for name, (m, t, f, b, link) in _SHEETS.items()}
_KEYS = {"memory": "24g", "tflops": "70", "tflops_fp32": "35", "bandwidth": "900", "link": "32", "network": "25"}
OWN = "--hardware mine:8,memory=24g,tflops=70,bandwidth=900"


def parse_hardware(text: str) -> Hardware:
    """What `--hardware` says: `a100-80g`, `a100-80g:8`, `a100-80g:2x8` (nodes x devices), with `,key=value` for other figures.

    Raises:
        ConfigError: neither a known device nor memory, tflops and bandwidth of another; or not written so.
    """
    first, *pairs = text.strip().lower().split(",")
    name, _, count = first.partition(":")
    nodes, devices = _count(count or "1", text)
    given = dict(_pair(pair, text) for pair in pairs)
    base = KNOWN.get(name)
    if base is None:
        missing = [key for key in ("memory", "tflops", "bandwidth") if key not in given]
        if missing:
            raise ConfigError(
                f"--hardware {text!r}: {name!r} is not known, and {', '.join(missing)} is not given; known are "
                f"{', '.join(KNOWN)}; another one with its figures: {OWN}"
            )
        base = Hardware(name, 0, 0, given.get("tflops_fp32", given["tflops"] / 2), 0, 32)
    return replace(base, nodes=nodes, devices=devices, **given)


def _count(text: str, whole: str) -> tuple[int, int]:
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", text)
    if not found:
        raise ConfigError(f"--hardware {whole!r}: {text!r} is no number of devices; write 8, or 2x8 for 2 nodes of 8")
    return int(found[1] or 1), int(found[2])


def _pair(text: str, whole: str) -> tuple[str, float]:
    key, equals, value = text.strip().partition("=")
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(g|gb|gib)?", value)
    if key not in _KEYS or not equals or not number or (number[2] and key != "memory") or not float(number[1]):
        shown = ", ".join(f"{name}={example}" for name, example in _KEYS.items())
        raise ConfigError(f"--hardware {whole!r}: {text!r} is not one of {shown}; e.g. {OWN}")
    return key, float(number[1]) * (GIB if key == "memory" else 1)
