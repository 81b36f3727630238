"""Rows: what each share keeps of an example as token ids, and the rules of length.

A prompt over `max_prompt_tokens` is left out. A response over `max_response_tokens` is left out with its row, or cut
(without EOS, as it has not ended) with `truncate_responses`. PPO only compares with its reference, so there an
over-long one is left empty and the prompt kept. `Tally` counts all of it by source: nothing disappears silently.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.data.encode import Encoder
from rlhf_core.data.formats import Example
from rlhf_core.data.split import Share
from rlhf_core.data.tables import Draft
from rlhf_core.data.template import Reason
from rlhf_core.specs import DataSpec

TRUNCATED = "responses truncated"
NO_REFERENCE = "references over max_response_tokens"
REPEATED = "repeated by weight"
Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """An example whose prompt is encoded and short enough; `mask` is 1 on earlier answers."""

    source: str
    example: Example
    ids: list[int]
    mask: list[int]


class Tally:
    """Counts of rows by source: read, dropped by reason, and notes on rows that were kept."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.notes: Counter[tuple[str, str]] = Counter()

    def drop(self, source: str, reason: Reason) -> None:
        """Count a row that is left out."""
        self.dropped[source, reason.value] += 1

    def reasons(self) -> dict[str, int]:
        """Rows left out by reason, all sources together, most frequent first."""
        total: Counter[str] = Counter()
        for (_, reason), count in self.dropped.items():
            total[reason] += count
        return dict(total.most_common())

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Counts of each source."""
        report = {}
        for source, read in self.read.items():
            dropped = {reason: count for (name, reason), count in sorted(self.dropped.items()) if name == source}
            notes = {note: count for (name, note), count in sorted(self.notes.items()) if name == source}
            kept = read + notes.get(REPEATED, 0) - sum(dropped.values())
            report[source] = {"read": read, "kept": kept, "dropped": dropped} | ({"notes": notes} if notes else {})
        return report


class RowMaker:
    """Encodes drafts and applies the rules of length."""

    def __init__(self, encoder: Encoder, spec: DataSpec, tally: Tally) -> None:
        self._encoder = encoder
        self._spec = spec
        self._tally = tally

    def of(self, share: Share, drafts: Sequence[Draft]) -> list[Row]:
        """Rows of one share."""
        encoded = self._encoder.prompts([draft.example.prompt for draft in drafts])
        prompts = []
        for draft, (ids, mask) in zip(drafts, encoded, strict=True):
            if len(ids) > self._spec.max_prompt_tokens:
                self._tally.drop(draft.source, Reason.LONG_PROMPT)
            else:
                prompts.append(Prompt(draft.source, draft.example, ids, mask))
        return list({"sft": self._sft, "reward": self._reward, "ppo": self._ppo}[share](prompts))

    def _sft(self, prompts: Sequence[Prompt]) -> Iterator[Row]:
        """Prompt and response in one, with the loss mask."""
        texts = [prompt.example.answer or prompt.example.chosen or "" for prompt in prompts]
        for prompt, text, ids in zip(prompts, texts, self._encoder.responses(texts), strict=True):
            response = self._limited(prompt.source, ids)
            if response is None:
                self._tally.drop(prompt.source, Reason.LONG_RESPONSE)
                continue
            yield {
                "input_ids": prompt.ids + response,
                "loss_mask": prompt.mask + [1] * len(response),
                "prompt": prompt.example.prompt_text,
                "response": text,
                "source": prompt.source,
            }

    def _reward(self, prompts: Sequence[Prompt]) -> Iterator[Row]:
        """A prompt with two responses; with none (empty ids) where the example has no pair."""
        chosen = self._encoder.responses([prompt.example.chosen or "" for prompt in prompts])
        rejected = self._encoder.responses([prompt.example.rejected or "" for prompt in prompts])
        for prompt, chosen_ids, rejected_ids in zip(prompts, chosen, rejected, strict=True):
            example = prompt.example
            row = {"prompt_ids": prompt.ids, "prompt": example.prompt_text, "source": prompt.source}
            if example.chosen is None:
                yield row | {"chosen_ids": [], "rejected_ids": [], "chosen": "", "rejected": ""}
                continue
            better, worse = self._limited(prompt.source, chosen_ids), self._limited(prompt.source, rejected_ids)
            if better is None or worse is None:
                self._tally.drop(prompt.source, Reason.LONG_RESPONSE)
            elif better == worse:
                self._tally.drop(prompt.source, Reason.SAME)
            else:
                texts = {"chosen": example.chosen, "rejected": example.rejected}
                yield row | texts | {"chosen_ids": better, "rejected_ids": worse}

    def _ppo(self, prompts: Sequence[Prompt]) -> Iterator[Row]:
        """A prompt, with a reference response where the source has one."""
        texts = [prompt.example.answer or prompt.example.chosen or "" for prompt in prompts]
        for prompt, text, ids in zip(prompts, texts, self._encoder.responses(texts), strict=True):
            response = self._limited(prompt.source, ids) if text else []
            if response is None:
                self._tally.notes[prompt.source, NO_REFERENCE] += 1
            yield {
                "prompt_ids": prompt.ids,
                "prompt": prompt.example.prompt_text,
                "response_ids": response or [],
                "response": text if response else "",
                "source": prompt.source,
            }

    def _limited(self, source: str, ids: list[int]) -> list[int] | None:
        """The response, cut if that is allowed, or None if it is too long."""
        limit = self._spec.max_response_tokens
        if len(ids) <= limit:
            return ids
        if not self._spec.truncate_responses:
            return None
        self._tally.notes[source, TRUNCATED] += 1
        return ids[:limit]
