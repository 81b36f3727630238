"""fp32 products on AMD's processors by oneDNN, where MKL leaves half of the processor idle.

torch gives fp32 products to MKL, whose kernels for AMD compute 256 bits at once. Zen 5 can compute 512, as oneDNN's do: 2.2 times
as fast (`tests/benchmarks/bench_kernels.py`). torch's only switch to oneDNN is that for products in bf16, an offer that oneDNN
takes up on processors with AMX alone; elsewhere it computes in fp32. That is tested before the switch is left on.
"""

import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

FROM_FAMILY = 26  # Zen 5
TOLD = ("vendor_id", "cpu family", "model", "flags", "Features")
SHAPES = ((64, 256, 96), (16, 768, 512), (400, 50, 300))
TOLERANCE = 1e-5  # of a product's spread; with bf16 it is some 1e-2


def use_fast_products() -> bool:
    """Have oneDNN compute fp32 products in this process from here on, where that is faster and as exact; whether it does."""
    if not _is_faster(processor()):
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if max(_errors()) < TOLERANCE:
        return True
    torch.set_float32_matmul_precision(before)
    return False


@contextmanager
def usual_products() -> Iterator[None]:
    """MKL's within a `with` block, in plain fp32: in products of single tokens with their keys oneDNN's calls cost more."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def processor() -> str:
    """What this machine's processor is and what instructions it has, in the lines of /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(TOLD)}))
    except OSError:
        return platform.processor()


def _is_faster(processor: str) -> bool:
    """Whether what `processor` says is one on which this was measured: AMD's from Zen 5 on, without AMX."""
    family = re.search(r"^cpu family\s*:\s*(\d+)$", processor, re.MULTILINE)
    amd = family is not None and "AuthenticAMD" in processor and int(family[1]) >= FROM_FAMILY
    return amd and "avx512f" in processor and "amx" not in processor and torch.backends.mkldnn.is_available()


def _errors(product: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Iterator[float]:
    """Largest errors of products of several shapes, as they occur forwards and backwards, relative to the products' spread."""
    noise = torch.Generator().manual_seed(0)
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner, generator=noise), torch.randn(columns, inner, generator=noise)
        c = torch.randn(rows, columns, generator=noise)
        for left, right in ((a, b.t()), (c, b), (c.t(), a)):
            exact = left.double() @ right.double()
            yield float((product(left, right).double() - exact).abs().max() / exact.std())
