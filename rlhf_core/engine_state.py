"""The state of a DeepSpeed engine as named pieces of named tensors, alike for every ZeRO stage and any number of processes.

A `Fragment` is what this rank holds of one flattened tensor: the fp32 weight, Adam's two moments, or the moving average of one
trained parameter. The same list of live views is written and filled, so saving and restoring cannot disagree. A rank that holds
the same pieces as before reads its own file; after a change of processes or ZeRO stage it takes what it needs from all files:
weights and moments are then equal to the last bit, whatever the layout. Frozen weights come from the inputs and are not here.
Files are safetensors, never pickles. State that DeepSpeed keeps on nvme cannot be read this way.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_core.ema import EMA
from rlhf_core.errors import IntegrityError
from rlhf_core.partitioned import shape_of

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Fragment:
    """A piece of a flattened tensor.

    Attributes:
        name: kind and parameter, e.g. `exp_avg/model.layers.0.mlp.up_proj.weight`.
        start: its first element in the whole.
        numel: elements of the whole.
        tensor: `[elements]`, a view of the live state.
        everywhere: every rank holds the same whole tensor.
    """

    name: str
    start: int
    numel: int
    tensor: Tensor
    everywhere: bool = False

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.name}@{self.start}"

    def cut(self, rank: int, world: int) -> "Fragment":
        """This rank's share of what all ranks hold whole."""
        first, last = self.numel * rank // world, self.numel * (rank + 1) // world
        return Fragment(self.name, first, self.numel, self.tensor[first:last])


@dataclass(frozen=True)
class _Flat:
    """One tensor that the optimizer updates, and which piece of which parameter lies where in it."""

    tensor: Tensor
    pieces: list[tuple[str, int, int, slice]]  # parameter, first element in it, its elements, where in `tensor`


class EngineState:
    """The state of one engine, and of its moving average if it has one."""

    def __init__(self, engine: Any, ema: EMA | None = None) -> None:
        self.engine, self.ema = engine, ema
        self.stage = int(engine.zero_optimization_stage())
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}

    @property
    def readable(self) -> bool:
        """Whether all of the state can be read: not what DeepSpeed keeps on nvme."""
        optimizer = self.engine.optimizer
        return self.stage < 3 or not (optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu)

    @property
    def layout(self) -> str:
        """Equal where every rank holds the same pieces."""
        return ("whole", "flat", "flat", "parts")[self.stage] + f"/{self.world}"

    @property
    def shared_out(self) -> bool:
        """Whether ranks hold alike what each saved only a share of, so that all files are needed to restore it."""
        return self.world > 1 and (self.stage == 0 or (self.ema is not None and self.stage < 3))

    @property
    def moves(self) -> int:
        """Optimizer steps so far: what has not moved need not be saved again."""
        return int(self.engine.global_steps)

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer that holds the moments."""
        return self.engine.optimizer.optimizer if self.stage else self.engine.optimizer

    def fragments(self) -> list[Fragment]:
        """All pieces this rank holds; moments only where the optimizer has made them."""
        found: list[Fragment] = []
        for flat in self._flats():
            state = self.adam.state.get(flat.tensor, {})
            kinds = {"weight": flat.tensor, **{kind: state[kind] for kind in MOMENTS if kind in state}}
            for kind, tensor in kinds.items():
                whole = tensor.detach().view(-1)
                found += [
                    Fragment(f"{kind}/{name}", first, numel, whole[part], self.stage == 0)
                    for name, first, numel, part in flat.pieces
                ]
        return found + self._average()

    def _flats(self) -> list[_Flat]:
        optimizer = self.engine.optimizer
        if self.stage == 0:
            parameters = [p for group in self.adam.param_groups for p in group["params"]]
            return [_Flat(p, [(self._names[id(p)], 0, p.numel(), slice(0, p.numel()))]) for p in parameters]
        if self.stage == 3:
            return [
                _Flat(flat, self._parts(group))
                for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
            ]
        groups = zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True)
        flats = zip(optimizer.single_partition_of_fp32_groups, groups, strict=True)
        return [_Flat(flat, self._slices(flat.numel(), *group)) for flat, group in flats]

    def _slices(
        self, size: int, parameters: Iterable[Tensor], offsets: Iterable[int]
    ) -> list[tuple[str, int, int, slice]]:
        """ZeRO 1 and 2: the parameters lie one behind the other, and each rank has `size` elements of all of them."""
        begin = self.rank * size
        found = []
        for parameter, offset in zip(parameters, offsets, strict=True):
            numel = parameter.numel()
            first, last = max(0, begin - offset), min(numel, begin + size - offset)
            if first < last:
                where = slice(offset + first - begin, offset + last - begin)
                found.append((self._names[id(parameter)], first, numel, where))
        return found

    def _parts(self, group: Iterable[Any]) -> list[tuple[str, int, int, slice]]:
        """ZeRO 3: each rank has a part of every parameter, the last ones padded."""
        found, offset = [], 0
        for parameter in group:
            held = int(parameter.ds_tensor.ds_numel)
            first, numel = self.rank * held, int(parameter.ds_numel)
            if first < numel:
                where = slice(offset, offset + min(held, numel - first))
                found.append((self._names[id(parameter)], first, numel, where))
            offset += held
        return found

    def _average(self) -> list[Fragment]:
        """The moving average: whole on every rank, or at ZeRO-3 a part."""
        if self.ema is None:
            return []
        parameters = [p for p in self.engine.module.parameters() if p.requires_grad]
        found = []
        for parameter, average in zip(parameters, self.ema.average, strict=True):
            numel, name = shape_of(parameter).numel(), f"average/{self._names[id(parameter)]}"
            first = self.rank * average.numel() if self.stage == 3 else 0
            if first < numel:
                found.append(Fragment(name, first, numel, average.view(-1)[: numel - first], self.stage < 3))
        return found

    def write(self, file: Path) -> None:
        """Write what this rank is to save; what all ranks hold alike is shared out among them."""
        fragments = [f.cut(self.rank, self.world) if f.everywhere else f for f in self.fragments()]
        save_file({f.key: f.tensor.contiguous() for f in fragments}, str(file))

    def counters(self) -> dict[str, Any]:
        """What of the state is no tensor: counters, Adam's step of each parameter, fp16's loss scale."""
        steps = {}
        for flat in self._flats():
            if "step" in (state := self.adam.state.get(flat.tensor, {})):
                steps.update({name: float(state["step"]) for name, *_ in flat.pieces})
        found: dict[str, Any] = {name: int(getattr(self.engine, name)) for name in COUNTERS}
        return {**found, "adam": steps, "loss_scale": self._loss_scale()}

    def _loss_scale(self) -> dict[str, float]:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler is not None else {}

    @torch.no_grad()
    def read(self, files: Sequence[Path], counters: Sequence[Mapping[str, Any]]) -> None:
        """Fill the live state; collective.

        Args:
            files: this rank's file if the layout is that of the checkpoint, else those of all ranks that wrote it.
            counters: of the same ranks.

        Raises:
            IntegrityError: a piece is missing. Nothing may be trained then.
        """
        steps = {name: step for one in counters for name, step in one["adam"].items()}
        self._make_moments(steps)
        with ExitStack() as stack:
            saved = _Saved([stack.enter_context(safe_open(file, framework="pt")) for file in files])
            for fragment in self.fragments():
                saved.fill(fragment)
        for name in COUNTERS:
            setattr(self.engine, name, counters[0][name])
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)  # not at ZeRO-0
        if scaler is not None:
            known = vars(scaler)
            known.update({k: v for k, v in counters[0]["loss_scale"].items() if k in known})
        self._spread()

    def _make_moments(self, steps: Mapping[str, float]) -> None:
        """Give the optimizer the state that it would have made by itself in its first step."""
        for flat in self._flats():
            known = {steps[name] for name, *_ in flat.pieces if name in steps}
            if not known:
                continue
            if len(known) > 1:
                raise IntegrityError(
                    f"checkpoint: parameters that are updated together have taken {sorted(known)} steps"
                )
            step = torch.tensor(known.pop(), dtype=torch.float32, device=flat.tensor.device)
            moments = {kind: torch.zeros_like(flat.tensor, memory_format=torch.preserve_format) for kind in MOMENTS}
            self.adam.state[flat.tensor] = {"step": step, **moments}

    def _spread(self) -> None:
        """Make the weights that compute from the fp32 weights; collective."""
        optimizer = self.engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer.checkpoint_event_prologue()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()


class _Saved:
    """The fragments in some files."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._index: dict[str, list[tuple[int, int, Any, str]]] = {}
        for handle in handles:
            for key in handle.keys():
                name, _, start = key.rpartition("@")
                length = handle.get_slice(key).get_shape()[0]
                self._index.setdefault(name, []).append((int(start), length, handle, key))

    def fill(self, fragment: Fragment) -> None:
        """Put the saved elements of a fragment into it; IntegrityError if some are not there."""
        begin, end = fragment.start, fragment.start + fragment.tensor.numel()
        reached = begin
        for start, length, handle, key in sorted(self._index.get(fragment.name, []), key=lambda piece: piece[0]):
            first, last = max(begin, start), min(end, start + length)
            if first == reached < last:
                fragment.tensor[first - begin : last - begin].copy_(handle.get_slice(key)[first - start : last - start])
                reached = last
        if reached < end:
            raise IntegrityError(f"checkpoint: elements {reached} to {end} of {fragment.name} are missing")
