"""fp32 products by oneDNN: only on processors on which that was measured, only if they are fp32, and not in rollouts."""

import pytest
import torch

from rlhf_core import cpu_products
from rlhf_core.cpu_products import _is_faster, use_fast_products, usual_products

ZEN = "vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: 2\nflags\t\t: fpu avx2 {flags}\n"
MATMUL = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(autouse=True)
def restored():
    before = MATMUL.fp32_precision
    yield
    MATMUL.fp32_precision = before


@pytest.mark.parametrize(
    ("processor", "faster"),
    [
        (ZEN.format(family=26, flags="avx512f avx512_bf16"), True),
        (ZEN.format(family=25, flags="avx512f avx512_bf16"), False),
        (ZEN.format(family=26, flags=""), False),
        (ZEN.format(family=26, flags="avx512f amx_tile"), False),
        (ZEN.format(family=26, flags="avx512f").replace("AuthenticAMD", "GenuineIntel"), False),
        ("", False),
    ],
)
def test_on_which_processors(processor, faster):
    assert _is_faster(processor) == (faster and torch.backends.mkldnn.is_available())


def test_products_are_fp32s_on_this_processor_whatever_was_chosen():
    use_fast_products()
    assert max(cpu_products._errors()) < cpu_products.TOLERANCE


def test_products_that_are_not_fp32_are_not_used(monkeypatch):
    monkeypatch.setattr(cpu_products, "_is_faster", lambda _: True)
    monkeypatch.setattr(cpu_products, "_errors", lambda: [1e-7, 1e-2])
    before = MATMUL.fp32_precision
    assert not use_fast_products() and MATMUL.fp32_precision == before
    monkeypatch.setattr(cpu_products, "_errors", lambda: [1e-7])
    assert use_fast_products() and MATMUL.fp32_precision == "bf16"


def test_bf16_would_be_seen():
    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.bfloat16().float() @ b.bfloat16().float()

    a, b = torch.randn(64, 256), torch.randn(256, 96)
    exact = a.double() @ b.double()
    assert (rounded(a, b).double() - exact).abs().max() / exact.std() > 100 * cpu_products.TOLERANCE


def test_the_usual_products_come_back_after_an_error():
    MATMUL.fp32_precision = "bf16"
    with pytest.raises(ValueError, match="out"), usual_products():
        assert MATMUL.fp32_precision == "ieee"
        raise ValueError("out")
    assert MATMUL.fp32_precision == "bf16"
