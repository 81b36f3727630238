"""What the scoring functions compute, written out over whole logits: the plain path that they are compared with."""

import torch
from torch import Tensor


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[targets] for `[..., vocabulary]` logits and `[...]` targets, fp32."""
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def response_logprobs(model, prompt, response, temperature=1.0, keep=None, vocabulary=None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one response's tokens; `prompt` and `response` are lists of ids."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logits = logits[:, :vocabulary].float() / temperature
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)
    return logs.gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1), entropy
