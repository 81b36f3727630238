"""fp32 products on AMD's processors by oneDNN, where MKL leaves half of the processor idle.

torch gives fp32 products to MKL, whose kernels for AMD compute 256 bits at once. Zen 5 can compute 512, as oneDNN's do: 2.2 times
as fast (`tests/benchmarks/bench_kernels.py`). torch's only switch to oneDNN is that for products in bf16, an offer that oneDNN
takes up on processors with AMX alone; elsewhere it computes in fp32. That is tested before the switch is left on.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FROM_FAMILY = 26  # Zen 5
MATMUL: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
SHAPES = ((64, 256, 96), (16, 768, 512), (400, 50, 300))
TOLERANCE = 1e-5  # of a product's spread; with bf16 it is some 1e-2


def use_fast_products() -> bool:
    """Have oneDNN compute fp32 products in this process from here on, where that is faster and as exact; whether it does."""
    if not _is_faster(_processor()):
        return False
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "bf16"
    if max(_errors()) < TOLERANCE:
        return True
    MATMUL.fp32_precision = before
    return False


@contextmanager
def usual_products() -> Iterator[None]:
    """torch's own choice within a `with` block: in products of single tokens with their keys oneDNN's calls cost more."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "ieee"
    try:
        yield
    finally:
        MATMUL.fp32_precision = before


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return ""


def _is_faster(processor: str) -> bool:
    """Whether a processor (its part of /proc/cpuinfo) is one on which this was measured: AMD's from Zen 5 on, without AMX."""
    family = re.search(r"^cpu family\s*:\s*(\d+)$", processor, re.MULTILINE)
    amd = family is not None and "AuthenticAMD" in processor and int(family[1]) >= FROM_FAMILY
    return amd and "avx512f" in processor and "amx" not in processor and torch.backends.mkldnn.is_available()


def _errors() -> Iterator[float]:
    """Largest errors of products of several shapes, as they occur forwards and backwards, relative to the products' spread."""
    noise = torch.Generator().manual_seed(0)
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner, generator=noise), torch.randn(columns, inner, generator=noise)
        c = torch.randn(rows, columns, generator=noise)
        for left, right in ((a, b.t()), (c, b), (c.t(), a)):
            exact = left.double() @ right.double()
            yield float(((left @ right).double() - exact).abs().max() / exact.std())
