"""Our kernels for CPUs give what plain formulas give in fp64, in any number of threads; without a compiler torch's are used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_core import cpu_kernels
from rlhf_core.cpu_kernels import (
    can_attend,
    can_pack,
    can_weigh,
    few_rows,
    packed,
    rows_attention,
    token_attention,
    weigh,
)

ROOT = Path(__file__).parents[2]
KINDS = [torch.float32, torch.bfloat16]
# relative to the result's spread: fp32 sums of some hundred numbers; results rounded to bf16
CLOSE = {torch.float32: 3e-5, torch.bfloat16: 0.04}
with_kernels = pytest.mark.skipif(cpu_kernels.library() is None, reason="no C++ compiler here, or no AVX-512")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tokens(heads: int, count: int, size: int, kind: torch.dtype) -> Tensor:
    """`[1, heads, tokens, head size]` as models make it: heads of a token side by side."""
    return torch.randn(1, count, heads, size).to(kind).transpose(1, 2).requires_grad_()


def plain_rows(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """softmax(q k' / sqrt(d) + causal mask) v of each row, in fp64."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True):
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[2:]).triu(1).bool()
        out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2))
    return torch.cat(out, 1)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).abs().max() / exact.detach().std())


@with_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "keys", "size", "lengths"),
    [
        (3, 3, 64, (1, 130, 0, 47, 48, 49, 6, 300)),
        (4, 2, 16, (5, 50)),
        (6, 1, 80, (33, 7)),
        (2, 2, 256, (97,)),
        (1, 1, 48, (2,)),
    ],
)
def test_attention_of_rows_and_its_gradients(heads, keys, size, lengths, kind):
    query, key, value = (tokens(h, sum(lengths), size, kind) for h in (heads, keys, keys))
    given = torch.randn(1, sum(lengths), heads, size).to(kind)
    assert can_attend(query, key, value)
    found = rows_attention(query, key, value, lengths, None)
    exact_inputs = [x.detach().double().requires_grad_() for x in (query, key, value)]
    exact = plain_rows(*exact_inputs, lengths)
    assert error(found, exact) < CLOSE[kind]
    gradients = torch.autograd.grad(found, (query, key, value), given)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, given.double())
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert ours.shape == theirs.shape and error(ours, theirs) < 3 * CLOSE[kind]


@with_kernels
def test_scores_far_from_zero_and_what_is_not_a_number():
    query, key, value = (tokens(2, 40, 32, torch.float32) for _ in range(3))
    found = rows_attention(100 * query, 100 * key, value, (40,), 1.0)  # scores of thousands
    exact = plain_rows(*(x.detach().double() for x in (100 * query * 32**0.5, 100 * key, value)), (40,))
    assert error(found, exact) < 1e-3 and torch.isfinite(found).all()
    query.data[0, 1, 20] = torch.nan
    found = rows_attention(query, key, value, (40,), None)
    assert found[0, 20, 1].isnan().all() and int(found.isnan().sum()) == 32


@with_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "keys", "size", "columns"), [(4, 4, 64, 77), (6, 2, 16, 5), (2, 1, 80, 200)])
def test_attention_of_one_token_over_a_part_of_a_cache(heads, keys, size, columns, kind):
    cache = [torch.randn(5, keys, columns + 9, size).to(kind)[:3, :, 4 : 4 + columns] for _ in range(2)]
    query = torch.randn(3, 1, heads, size).to(kind).transpose(1, 2)
    mask = torch.ones(3, 1, 1, columns, dtype=torch.bool)
    mask[0, ..., :3], mask[1, ..., 2], mask[2, ..., :-1] = False, False, False
    for shown in (mask, None):
        found = token_attention(query, *cache, shown, None)
        exact = functional.scaled_dot_product_attention(
            query.double(), *(x.double().repeat_interleave(heads // keys, 1) for x in cache), attn_mask=shown
        )
        assert found.shape == (3, 1, heads, size) and error(found, exact.transpose(1, 2)) < CLOSE[kind]


@with_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 160), (50, 37), (768, 5)])
def test_products_of_few_rows(inputs, outputs, kind):
    weight, bias = torch.randn(outputs, inputs).to(kind), torch.randn(outputs).to(kind)
    if not can_pack(weight):
        pytest.skip("this processor has no such instructions")
    panels = packed(weight)
    for rows in (1, 2, 15, 16, 17, 40):
        x = torch.randn(rows, 1, inputs).to(kind)
        exact = x.double() @ weight.double().t()
        assert error(few_rows(x, panels, None, outputs), exact) < CLOSE[kind]
        assert error(few_rows(x, panels, bias, outputs), exact + bias.double()) < CLOSE[kind]


@with_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "temperature"), [(1, 1.0), (128, 0.7), (1000, 1.0), (50_257, 1.3)])
def test_weights_of_a_distribution(size, temperature, kind):
    logits = (4 * torch.randn(3, size + 5)).to(kind)[:, :size]
    assert can_weigh(logits)
    weights, sums, largest, products = weigh(logits, temperature)
    tempered = logits.double() / temperature
    exact = (tempered - tempered.amax(-1, keepdim=True)).exp()
    assert torch.allclose(largest.double(), tempered.amax(-1), rtol=1e-6)
    assert torch.allclose(weights[:, :size].double(), exact, rtol=3e-6) and not weights[:, size:].any()
    assert sums.shape == (3, -(-size // 128)) and torch.allclose(sums.sum(-1), exact.sum(-1), rtol=1e-6)
    mean = (exact * (tempered - tempered.amax(-1, keepdim=True))).sum(-1)
    assert torch.allclose(products, mean, rtol=1e-5, atol=1e-9)


@with_kernels
def test_weights_of_tokens_that_cannot_be_and_of_what_is_not_a_number():
    logits = torch.randn(2, 300)
    logits[0, 7], logits[0, 299], logits[1, 3] = -torch.inf, -torch.inf, torch.nan
    weights, sums, _, products = weigh(logits, 1.0)
    assert weights[0, 7] == 0 == weights[0, 299] and torch.isfinite(products[0]) and torch.isfinite(sums[0]).all()
    assert weights[1, 3].isnan() and sums[1, 0].isnan()


@with_kernels
def test_bits_do_not_depend_on_the_number_of_threads():
    lengths = (70, 3, 120)
    query, key, value = (tokens(4, sum(lengths), 32, torch.float32) for _ in range(3))
    weight = torch.randn(200, 64)
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = rows_attention(query, key, value, lengths, None)
            gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
            one = token_attention(query[:, :, :1], key, value, None, None)
            made.append([out, *gradients, one])
            if can_pack(weight):
                made[-1].append(few_rows(torch.ones(3, 64), packed(weight), None, 200))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@with_kernels
def test_what_the_kernels_do_not_take():
    def refused(change) -> bool:
        query, key, value = (tokens(2, 8, 32, torch.float32) for _ in range(3))
        return not can_attend(*change(query, key, value))

    assert not refused(lambda q, k, v: (q, k, v))
    assert refused(lambda q, k, v: (q.half(), k.half(), v.half()))
    assert refused(lambda q, k, v: (q.bfloat16(), k, v))
    assert refused(lambda q, k, v: (q[..., :24], k[..., :24], v[..., :24]))
    assert refused(lambda q, k, v: (q[..., ::2], k[..., ::2], v[..., ::2]))
    assert not can_pack(torch.randn(4, 7).bfloat16()) and not can_pack(torch.randn(4, 8).half())


@with_kernels
def test_lengths_and_sizes_that_do_not_fit_are_errors_not_memory_of_others():
    query, key, value = (tokens(2, 8, 32, torch.float32) for _ in range(3))
    for lengths in ((4, 5), (9, -1), (3,)):
        with pytest.raises(ValueError, match="lengths"):
            rows_attention(query, key, value, lengths, None)
    assert not can_attend(query, tokens(3, 8, 32, torch.float32), tokens(3, 8, 32, torch.float32))
    panels = packed(torch.randn(20, 8))
    for x in (torch.randn(2, 9), torch.randn(2, 8).bfloat16()):
        with pytest.raises(ValueError, match="other weights"):
            few_rows(x, panels, None, 20)
    for bias in (torch.randn(19), torch.randn(20).bfloat16(), torch.randn(40)[::2]):
        with pytest.raises(ValueError, match="bias"):
            few_rows(torch.randn(2, 8), panels, bias, 20)


COMPILE = """
from rlhf_core import cpu_kernels
print(cpu_kernels.library() is not None)
"""


def run(cache: Path, **environment: str) -> subprocess.Popen[str]:
    """Another process that has no kernels yet."""
    own = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@with_kernels
def test_ranks_that_come_at_once_compile_one_file_and_later_ones_none(tmp_path):
    ranks = [run(tmp_path) for _ in range(3)]
    assert [rank.communicate()[0].strip() for rank in ranks] == ["True"] * 3
    (made,) = (tmp_path / "rlhf").iterdir()
    before = made.stat().st_mtime_ns
    assert run(tmp_path).communicate()[0].strip() == "True"
    assert made.stat().st_mtime_ns == before


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/c++ -m64"])
def test_without_a_compiler_torch_is_used_and_that_is_said(compiler, tmp_path):
    out, err = run(tmp_path, CXX=compiler).communicate()
    assert out.strip() == "False"
    assert err.count("torch's are used") == 1


@with_kernels
def test_a_compiler_may_be_a_command_with_arguments(tmp_path):
    assert run(tmp_path, CXX="env g++").communicate()[0].strip() == "True"
