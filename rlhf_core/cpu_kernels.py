"""Kernels of our own for CPUs (`cpu_kernels.cpp`), where torch's reach a fraction of the processor's speed.

Attention in fp32, whatever the type of queries and keys, and products of few rows. They are compiled once on a machine, in
seconds, into the user's cache folder; without a compiler or AVX-512 torch's are used, which is said once.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core.compiler import compiler
from rlhf_core.cpu_products import processor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
SECONDS = 120  # to compile
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LANES, LARGEST = 16, 256  # a head's size is a multiple of the first and at most the second
FEW = 64  # rows; more are for oneDNN
TOGETHER = 128  # weights of a distribution that are summed up together


def takes_heads(size: int) -> bool:
    """Whether the kernels are there and attend in heads of that size."""
    return size % LANES == 0 and size <= LARGEST and library() is not None


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels are there and take tensors like these, `[rows, heads, tokens, head size]`."""
    fits = query.shape[-1] == key.shape[-1] and key.shape == value.shape
    fits = fits and query.shape[0] == key.shape[0] and query.shape[1] % key.shape[1] == 0
    side_by_side = query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    alike = query.dtype == key.dtype == value.dtype and query.dtype in KINDS and query.device.type == "cpu"
    return fits and side_by_side and alike and takes_heads(query.shape[-1])


def rows_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None) -> Tensor:
    """Causal attention of rows that lie side by side, each to itself; differentiable.

    Args:
        query: `[1, heads, tokens, head size]`.
        key, value: the same with as many heads, or a divisor of them.
        lengths: tokens of each row.
        scale: of the scores; default 1 / sqrt(head size).

    Returns:
        `[1, tokens, heads, head size]`.

    Raises:
        ValueError: the lengths are not those of the tokens.
    """
    if sum(lengths) != query.shape[2] or query.shape[2] != key.shape[2] or min(lengths) < 0:
        raise ValueError(f"lengths: {list(lengths)} for {query.shape[2]} queries and {key.shape[2]} keys")
    return _Rows.apply(query, key, value, lengths, query.shape[-1] ** -0.5 if scale is None else scale)  # pyright: ignore


def token_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention of one token of each row to those that `mask` shows it.

    Args:
        query: `[rows, heads, 1, head size]`.
        key, value: `[rows, heads or a divisor, columns, head size]`, both with the same strides.
        mask: `[rows, 1, 1, columns]` bool, True on at least one column of each row; None: all.
        scale: of the scores; default 1 / sqrt(head size).

    Returns:
        `[rows, 1, heads, head size]`.
    """
    rows, heads, _, size = query.shape
    query = query.contiguous()
    out = query.new_empty((rows, 1, heads, size))
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    strides = (ctypes.c_int64 * 3)(key.stride(0), key.stride(2), key.stride(1))
    _function("token", query.dtype)(
        _at(query), _at(key), _at(value), _at(out), None if mask is None else _at(mask),
        ctypes.c_int64(0 if mask is None else mask.stride(0)), *map(ctypes.c_int64, (rows, heads, *key.shape[1:])), strides,
        ctypes.c_float(size**-0.5 if scale is None else scale),
    )  # fmt: skip
    return out


def can_pack(weight: Tensor) -> bool:
    """Whether there is a kernel for products of few rows with weights like this, `[outputs, inputs]`."""
    if weight.dtype not in KINDS or weight.device.type != "cpu" or (found := library()) is None:
        return False
    return weight.shape[1] * weight.itemsize % 4 == 0 and bool(getattr(found, f"has_{KINDS[weight.dtype]}")())


def packed(weight: Tensor) -> Tensor:
    """A copy of a weight `[outputs, inputs]` as `few_rows` reads it."""
    weight = weight.contiguous()
    outputs, inputs = weight.shape
    panels = weight.new_empty(-(-outputs // LANES) * LANES * inputs)
    words = ctypes.c_int64(inputs * weight.itemsize // 4)
    found = library()
    assert found is not None
    found.pack(_at(weight), _at(panels), ctypes.c_int64(outputs), words)
    return panels


def few_rows(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """The linear layer whose weight is `packed` in `panels`, of `[…, inputs]`. ValueError: types or sizes do not fit."""
    x = x.contiguous()
    inputs = x.shape[-1]
    if x.dtype != panels.dtype or panels.numel() != -(-outputs // LANES) * LANES * inputs:
        raise ValueError(f"x: {list(x.shape)} {x.dtype} for a layer of other weights, {panels.dtype}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (outputs,) or not bias.is_contiguous()):
        raise ValueError(f"bias: {list(bias.shape)} {bias.dtype} for {outputs} outputs, {x.dtype}")
    out = x.new_empty((*x.shape[:-1], outputs))
    _function("few_rows", x.dtype)(
        _at(x), _at(panels), None if bias is None else _at(bias), _at(out),
        *map(ctypes.c_int64, (x.numel() // inputs, inputs, outputs)),
    )  # fmt: skip
    return out


def can_weigh(logits: Tensor) -> bool:
    """Whether there is a kernel for the weights of distributions with such logits."""
    return logits.dtype in KINDS and logits.device.type == "cpu" and logits.stride(-1) == 1 and library() is not None


def weigh(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What tokens are drawn by: softmax before it is divided by its sum, in one pass.

    Args:
        logits: `[rows, tokens]`.
        temperature: divides them.

    Returns:
        weights: e^(x / temperature - largest), fp32, `[rows, blocks * 128]`, zeros in the end.
        sums: of each block of 128, fp64, `[rows, blocks]`.
        largest: of x / temperature, fp32, `[rows]`.
        products: sum of weight times x / temperature - largest, fp64, `[rows]`.
    """
    rows, size = logits.shape
    blocks = -(-size // TOGETHER)
    weights, largest = (
        logits.new_empty(rows, blocks * TOGETHER, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )
    sums, products = (logits.new_empty(shape, dtype=torch.float64) for shape in ((rows, blocks), (rows,)))
    _function("weights", logits.dtype)(
        _at(logits), ctypes.c_int64(logits.stride(0)), *map(_at, (weights, sums, largest, products)),
        *map(ctypes.c_int64, (rows, size, blocks)), ctypes.c_float(temperature),
    )  # fmt: skip
    return weights, sums, largest, products


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        _, heads, tokens, size = query.shape
        out = query.new_empty((1, tokens, heads, size))
        logs = query.new_empty((heads, tokens), dtype=torch.float32)
        ctx.lengths, ctx.scale = lengths, scale
        ctx.save_for_backward(query, key, value, out, logs)
        _function("rows_forward", query.dtype)(
            *map(_at, (query, key, value, out, logs)), *_sizes(query, key, lengths), _strides(query, key, value),
            ctypes.c_float(scale),
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (given,) = gradients
        given = given if given.stride(-1) == 1 else given.contiguous()
        query, key, value, out, logs = ctx.saved_tensors
        made = [torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (query, key, value)]
        _function("rows_backward", query.dtype)(
            *map(_at, (given, query, key, value, out, logs, *made)), *_sizes(query, key, ctx.lengths),
            _strides(query, key, value, given.transpose(1, 2)), ctypes.c_float(ctx.scale),
        )  # fmt: skip
        return *(x.transpose(1, 2) for x in made), None, None


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(query: Tensor, key: Tensor, lengths: Sequence[int]) -> tuple[Any, ...]:
    """Arguments: tokens, where rows end, rows, heads of queries and of keys, size of a head."""
    ends = (ctypes.c_int64 * len(lengths))(*accumulate(lengths))
    _, heads, tokens, size = query.shape
    whole = ctypes.c_int64
    return whole(tokens), ends, whole(len(lengths)), whole(heads), whole(key.shape[1]), whole(size)


def _strides(*tensors: Tensor) -> Any:
    """Between tokens and between heads, of each tensor `[1, heads, tokens, head size]`."""
    return (ctypes.c_int64 * (2 * len(tensors)))(*(x.stride(dim) for x in tensors for dim in (2, 1)))


@cache
def _function(name: str, kind: torch.dtype) -> Any:
    found = library()
    assert found is not None
    function = getattr(found, f"{name}_{KINDS[kind]}")
    function.restype = None
    return function


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if they are not yet; None: there are none for this machine, which is said once."""
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()[-300:]
        return _without(f"as ours cannot be compiled here ({reason})")
    return found if found.has_float32() else _without("as this processor has no AVX-512")


def _without(why: str) -> None:
    print(f"kernels: torch's are used, {why}", file=sys.stderr, flush=True)


def _compiled() -> Path:
    """The file of the kernels for this processor; OSError, SubprocessError, RuntimeError (no home folder): none can be made."""
    command = compiler()
    if not command:
        raise FileNotFoundError("no C++ compiler")
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    what = "\n".join((SOURCE.read_text(), " ".join(FLAGS), version, processor()))  # a home folder may be shared
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf"
    path = folder / f"kernels-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # no lock: ranks that come at once compile it each
            made = Path(scratch) / path.name
            command += [*FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
            made.replace(path)
    return path
