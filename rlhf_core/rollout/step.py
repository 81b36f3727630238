"""One forward pass of a rollout: the logits at the last position of left-padded rows, over what a cache holds of them."""

from typing import Any

from torch import Tensor

from rlhf_core.models import _accepts


def last_logits(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """`[rows, vocabulary]`, from the head at the last position only where the model can do that.

    Args:
        model: a transformers causal language model.
        ids: `[rows, new tokens]`.
        mask: `[rows, tokens]`, 1 on real tokens, those in the cache and the new ones.
        cache: what transformers takes as `past_key_values`; None: nothing is kept.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if _accepts(type(model), "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    if _accepts(type(model), "position_ids"):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(**inputs, past_key_values=cache, use_cache=cache is not None).logits[:, -1]
