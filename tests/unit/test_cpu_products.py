"""fp32 products by oneDNN: only on processors on which that was measured, only if they are fp32, and not in rollouts."""

import pytest
import torch
from test_rollout import tiny

from rlhf_core import cpu_products
from rlhf_core.cpu_products import _is_faster, use_fast_products, usual_products
from rlhf_core.rollout import Sampling, generate

ZEN = "vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: 2\nflags\t\t: fpu avx2 {flags}\n"


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


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
    noise = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=noise) for shape in ((7, 130, 96), (200, 96), (200,)))
    for found, exact in (
        (torch.nn.functional.linear(x, weight, bias), x.double() @ weight.double().t() + bias.double()),
        (torch.bmm(x, x.transpose(1, 2)), x.double() @ x.double().transpose(1, 2)),
    ):
        assert (found.double() - exact).abs().max() / exact.std() < cpu_products.TOLERANCE


def test_products_that_are_not_fp32_are_not_used(monkeypatch):
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(cpu_products, "_is_faster", lambda _: True)
    monkeypatch.setattr(cpu_products, "_errors", lambda: [1e-7, 1e-2])
    assert not use_fast_products() and torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(cpu_products, "_errors", lambda: [1e-7])
    assert use_fast_products() and torch.get_float32_matmul_precision() == "medium"


def test_bf16_would_be_seen():
    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.bfloat16().float() @ b.bfloat16().float()

    assert min(cpu_products._errors(rounded)) > 100 * cpu_products.TOLERANCE


def test_the_usual_products_come_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(ValueError, match="out"), usual_products():
        assert torch.get_float32_matmul_precision() == "highest"
        raise ValueError("out")
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("engine", ["slots", "plain", "generate"])
def test_every_engine_samples_with_the_usual_products(engine):
    torch.set_float32_matmul_precision("medium")
    model, seen = tiny("llama"), set()
    model.register_forward_pre_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    generate(model, [[5, 6, 7]], [0], Sampling(3), seed=0, eos=39, pad=0, engine=engine)
    assert seen == {"highest"} and torch.get_float32_matmul_precision() == "medium"
