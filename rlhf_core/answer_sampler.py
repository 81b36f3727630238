"""The answers of a rollout, sampled by the actor: how its weights lie meanwhile is decided here, and undone.

At ZeRO-3 the weights are gathered once a rollout where that fits, and adapters are merged into a copy (see `rollout.twin`). What
is not named by resources is decided at the first rollout: it fits if it takes at most half of the memory that every rank has
free then. Checkpoints keep the decision, as sums in another order round otherwise; one that does not fit any more at all, on a
smaller machine, is made anew.
"""

import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.accelerator import get_accelerator

from rlhf_core.distributed import gather
from rlhf_core.doctor import GIB, memory
from rlhf_core.errors import ConfigError
from rlhf_core.partitioned import is_partitioned, release_freed
from rlhf_core.ppo_args import PPOArgs
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine
from rlhf_core.rollout import Rollout, Sampling, generate
from rlhf_core.rollout.on_vllm import check_vllm
from rlhf_core.rollout.twin import can_merge, twin, twin_bytes

AS_THEY_ARE = "as they are"


class AnswerSampler:
    """Samples answers with the actor of one engine.

    Attributes:
        decided: whether a change of the weights for rollouts ("gathered", "merged", "gathered and merged") is made, by its
            name; empty until the first rollout, and where resources leave nothing to decide. For checkpoints.
    """

    def __init__(self, engine: DeepSpeedRLHFEngine, args: PPOArgs) -> None:
        """ConfigError: resources ask for what cannot be done with this actor."""
        self.model: Any = engine.actor.module
        self.tokenizer, self.seed, self.resources = engine.tokenizer, args.seed, args.resources
        spec, limit = args.spec, args.max_response_tokens
        self.sampling = Sampling(limit, spec.temperature, spec.top_k, spec.top_p, len(engine.tokenizer))
        self._vllm = self.resources.rollout_engine == "vllm"  # which has the weights once more anyway
        if self._vllm:
            check_vllm(self.sampling)
        self.decided: dict[str, bool] = {}
        self._main = engine.ranks.rank == 0
        self._partitioned = is_partitioned(self.model)
        self._merge = spec.actor_lora is not None and self.resources.rollout_lora != "applied" and can_merge(self.model)
        if spec.actor_lora and self.resources.rollout_lora == "merged" and not self._merge:
            raise ConfigError("resources.rollout_lora 'merged': adapters on 4-bit weights are not merged; set auto")
        self._weights: str | None = None

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        names: Sequence[int],
        on_batch: Callable[[int], None] | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> Rollout:
        """One answer to each prompt; collective at ZeRO-3. The arguments are those of `rollout.generate`."""
        model = self.model if self.weights == AS_THEY_ARE else twin(self.model, self._merge)
        shared = model is self.model
        try:
            return generate(
                model,
                prompts,
                names,
                self.sampling,
                seed=self.seed,
                eos=self.tokenizer.eos_token_id,
                pad=self.tokenizer.pad_token_id,
                batch_size=self.resources.rollout_micro_batch,
                lock_step=self.lock_step,
                on_batch=on_batch,
                on_token=on_token,
                engine=self.resources.rollout_engine,
            )
        finally:
            del model
            if not shared:
                release_freed()

    @property
    def lock_step(self) -> bool:
        """Whether every pass of a rollout is collective. Collective itself the first time."""
        return self._partitioned and self.weights == AS_THEY_ARE

    @property
    def weights(self) -> str:
        """How weights lie in rollouts: as they are, or what `decided` names. Collective the first time."""
        if self._weights is None:
            self._weights = self._decide()
        return self._weights

    def _decide(self) -> str:
        if self._vllm or not (self._partitioned or self._merge):
            return AS_THEY_ARE
        names = [name for name, on in (("gathered", self._partitioned), ("merged", self._merge)) if on]
        change = " and ".join(names)
        asked = self.resources.rollout_gather if self._partitioned else self.resources.rollout_lora
        if asked != "auto":
            return AS_THEY_ARE if asked == "layers" else change
        need, free = twin_bytes(self.model, self._merge), free_bytes()
        kept = self.decided.get(change)
        self.decided[change] = kept is not False and need <= (free if kept else free / 2)
        taken = change if self.decided[change] else AS_THEY_ARE
        if self._main:
            sizes = f"{need / GIB:.2f} GiB to be {change}, {free / GIB:.2f} free for each rank"
            print(f"rollout: weights {taken} ({sizes})", file=sys.stderr, flush=True)
        return taken


def free_bytes() -> int:
    """Memory that each rank may still use where it computes, the least of all ranks. Collective."""
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        here = socket.gethostname()
        own = memory()[0] // gather(here).count(here)
    else:
        own = accelerator.available_memory()
    return min(gather(own))
