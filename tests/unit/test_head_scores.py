"""The head in blocks gives the numbers and gradients of whole logits, for every family, and never holds them."""

import pytest
import torch
from plain import response_logprobs
from test_rollout import FAMILIES, tiny

from rlhf_core import head_scores
from rlhf_core.head_scores import can_score
from rlhf_core.rollout import Sampling, generate, keep_tokens, pack_bits
from rlhf_core.scoring import close_up, label_nats, response_scores

PROMPTS = [[5, 6, 7], [9], [8, 7, 6, 5, 4, 3, 10], [11, 12]]


def sampled(model, sampling=Sampling(9)):
    """A rollout's prompts and responses, padded; the second response is cut to two tokens."""
    r = generate(model, PROMPTS, range(4), sampling, seed=7, eos=39, pad=0)
    r.response_mask[1, 2:] = 0
    r.response_ids[1, 2:] = 0
    return r.prompt_ids, r.prompt_mask, r.response_ids, r.response_mask


def lists(sequence):
    prompts, prompt_mask, responses, mask = sequence
    return [
        (p[m.bool()].tolist(), r[k.bool()].tolist())
        for p, m, r, k in zip(prompts, prompt_mask, responses, mask, strict=True)
    ]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_each_row_alone_over_whole_logits(family, monkeypatch):
    monkeypatch.setattr(head_scores, "BLOCK_BYTES", 7 * 4 * 40)  # seven positions at once
    monkeypatch.setattr(head_scores, "CACHED_BYTES", 3 * 4 * 40)  # and three of them in fp32
    model = tiny(family)
    assert can_score(model)
    sequence = sampled(model, Sampling(9, vocabulary=35))
    mask = sequence[3].bool()
    weights = torch.rand(2, *mask.shape, generator=torch.Generator().manual_seed(0))
    found = response_scores(model, *sequence, temperature=0.7, entropy=True, vocabulary=35)
    assert not found.logprobs[~mask].any() and not found.entropy[~mask].any()
    plain = [response_logprobs(model, p, r, 0.7, vocabulary=35) for p, r in lists(sequence)]
    for i, kind in enumerate((found.logprobs, found.entropy)):
        assert torch.allclose(kind[mask], torch.cat([row[i] for row in plain]), atol=1e-5), family
    ours = gradients(model, (found.logprobs * weights[0] + found.entropy * weights[1]).sum())
    by_row = [(w0[m], w1[m]) for w0, w1, m in zip(*weights, mask, strict=True)]
    loss = sum((logs * a + entropy * b).sum() for (logs, entropy), (a, b) in zip(plain, by_row, strict=True))
    theirs = gradients(model, loss)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=2e-5, rtol=1e-4), f"{family} {name}"


def test_a_filtered_distribution_is_normalised_over_what_was_kept_and_has_its_gradients(monkeypatch):
    monkeypatch.setattr(head_scores, "BLOCK_BYTES", 3 * 4 * 40)
    monkeypatch.setattr(head_scores, "CACHED_BYTES", 2 * 4 * 40)
    model, sampling = tiny("llama"), Sampling(9, top_k=12, top_p=0.9)
    sequence = sampled(model, sampling)
    mask = sequence[3].bool()
    keeps = []
    for prompt, response in lists(sequence):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].detach()
        keeps.append(keep_tokens(logits, sampling))
    support = torch.zeros(*mask.shape, 5, dtype=torch.uint8)
    support[mask] = pack_bits(torch.cat(keeps))
    found = response_scores(model, *sequence, support=support, entropy=True)
    plain = [response_logprobs(model, p, r, keep=k) for (p, r), k in zip(lists(sequence), keeps, strict=True)]
    assert torch.allclose(found.logprobs[mask], torch.cat([row[0] for row in plain]), atol=1e-5)
    assert torch.allclose(found.entropy[mask], torch.cat([row[1] for row in plain]), atol=1e-5)
    ours = gradients(model, (found.logprobs + found.entropy).sum())
    theirs = gradients(model, sum((logs + entropy).sum() for logs, entropy in plain))
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5, rtol=1e-4) for name in theirs)


def test_a_model_that_changes_its_logits_afterwards_is_scored_by_these():
    model = tiny("gemma3")
    sequence = sampled(model)
    before = response_scores(model, *sequence).logprobs
    model.config.final_logit_softcapping = 0.5
    assert not can_score(model)
    found = response_scores(model, *sequence).logprobs
    expected = torch.cat([response_logprobs(model, p, r)[0] for p, r in lists(sequence)])
    assert torch.allclose(found[sequence[3].bool()], expected, atol=1e-5) and not torch.allclose(found, before)


def test_in_bf16_gradients_summed_over_blocks_are_as_near_as_those_of_one(monkeypatch):
    model = tiny("opt")
    sequence = sampled(model)

    def head_gradient(precision: torch.dtype) -> torch.Tensor:
        cast = tiny("opt").to(precision)
        return gradients(cast, response_scores(cast, *sequence).logprobs.sum())[
            "lm_head.weight" if not cast.config.tie_word_embeddings else "model.decoder.embed_tokens.weight"
        ].float()

    exact = head_gradient(torch.float32)
    whole = (head_gradient(torch.bfloat16) - exact).norm()
    monkeypatch.setattr(head_scores, "BLOCK_BYTES", 4 * 40)
    assert (head_gradient(torch.bfloat16) - exact).norm() < 1.5 * whole + 1e-6


def test_texts_without_a_counted_token_give_nothing_and_a_gradient_of_zero():
    model = tiny("gpt2")
    nats, texts = label_nats(model, [[5, 6, 7]], [[1, 0, 0]], 0, torch.device("cpu"))
    assert nats.shape == texts.shape == (0,)
    assert not any(g.any() for g in gradients(model, nats.sum()).values())


def test_no_tensor_as_large_as_tokens_times_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(head_scores, "BLOCK_BYTES", 5 * 4 * 40)
    model, seen = tiny("opt"), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (40,) and tensor.shape != (64, 40):
                    seen.append(tensor.numel() // 40)
            return made

    sequence = sampled(model)
    with Watch():
        scores = response_scores(model, *sequence, entropy=True)
        (scores.logprobs + scores.entropy).sum().backward()
    assert seen and max(seen) == 5 < int(sequence[3].sum())


def test_rows_are_closed_up_to_the_longest():
    prompts, prompt_mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    responses, mask = torch.tensor([[3, 4, 0], [2, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids, real, answers = close_up(prompts, prompt_mask, responses, mask)
    assert ids.tolist() == [[5, 6, 3, 4], [7, 8, 9, 2]] and real.all()
    assert answers.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
