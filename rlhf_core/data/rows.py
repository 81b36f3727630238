"""Rows: what each share keeps of an example as token ids, and the rules of length.

A prompt over `max_prompt_tokens` is left out. A response over `max_response_tokens` is left out with its row, or cut (without
EOS, as it has not ended) with `truncate_responses`. PPO only compares with its reference, so there an over-long one is left
empty and the prompt kept. `Tally` counts all of it by source: nothing disappears silently.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_core.data.encode import Encoder
from rlhf_core.data.split import Share
from rlhf_core.data.tables import Draft
from rlhf_core.data.template import Reason
from rlhf_core.specs import DataSpec

TRUNCATED = "responses truncated"
NO_REFERENCE = "references over max_response_tokens"
Row = dict[str, Any]


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
            kept = read - sum(dropped.values())
            report[source] = {"read": read, "kept": kept, "dropped": dropped} | ({"notes": notes} if notes else {})
        return report


class RowMaker:
    """Encodes drafts and applies the rules of length."""

    def __init__(self, encoder: Encoder, spec: DataSpec, tally: Tally) -> None:
        self._encoder = encoder
        self._spec = spec
        self._tally = tally

    def sft(self, drafts: Sequence[Draft]) -> Iterator[Row]:
        """Rows of prompt and response in one, with the loss mask."""
        texts = [draft.example.answer or draft.example.chosen or "" for draft in drafts]
        responses = self._encoder.responses(texts)
        for i, draft, prompt, mask in self._prompts(drafts):
            response = self._limited(draft.source, responses[i])
            if response is None:
                self._tally.drop(draft.source, Reason.LONG_RESPONSE)
                continue
            yield {
                "input_ids": prompt + response,
                "loss_mask": mask + [1] * len(response),
                "prompt": draft.example.prompt_text,
                "response": texts[i],
            }

    def reward(self, drafts: Sequence[Draft]) -> Iterator[Row]:
        """Rows of a prompt with two responses; rows of a prompt alone (empty ids) where the draft has no pair."""
        chosen = self._encoder.responses([draft.example.chosen or "" for draft in drafts])
        rejected = self._encoder.responses([draft.example.rejected or "" for draft in drafts])
        for i, draft, prompt, _ in self._prompts(drafts):
            example = draft.example
            row = {"prompt_ids": prompt, "prompt": example.prompt_text, "source": draft.source}
            if example.chosen is None:
                yield row | {"chosen_ids": [], "rejected_ids": [], "chosen": "", "rejected": ""}
                continue
            better, worse = self._limited(draft.source, chosen[i]), self._limited(draft.source, rejected[i])
            if better is None or worse is None:
                self._tally.drop(draft.source, Reason.LONG_RESPONSE)
            elif better == worse:
                self._tally.drop(draft.source, Reason.SAME)
            else:
                pair = {"chosen_ids": better, "rejected_ids": worse}
                yield row | pair | {"chosen": example.chosen, "rejected": example.rejected}

    def ppo(self, drafts: Sequence[Draft]) -> Iterator[Row]:
        """Rows of a prompt, with a reference response where the source has one."""
        texts = [draft.example.answer or draft.example.chosen or "" for draft in drafts]
        responses = self._encoder.responses(texts)
        for i, draft, prompt, _ in self._prompts(drafts):
            response = self._limited(draft.source, responses[i]) if texts[i] else []
            if response is None:
                self._tally.notes[draft.source, NO_REFERENCE] += 1
            yield {
                "prompt_ids": prompt,
                "prompt": draft.example.prompt_text,
                "response_ids": response or [],
                "response": texts[i] if response else "",
            }

    def of(self, share: Share, drafts: Sequence[Draft]) -> list[Row]:
        """Rows of one share."""
        return list({"sft": self.sft, "reward": self.reward, "ppo": self.ppo}[share](drafts))

    def _prompts(self, drafts: Sequence[Draft]) -> Iterator[tuple[int, Draft, list[int], list[int]]]:
        """Index, draft, ids and mask of the drafts whose prompt is not too long."""
        encoded = self._encoder.prompts([draft.example.prompt for draft in drafts])
        for i, (draft, (ids, mask)) in enumerate(zip(drafts, encoded, strict=True)):
            if len(ids) > self._spec.max_prompt_tokens:
                self._tally.drop(draft.source, Reason.LONG_PROMPT)
            else:
                yield i, draft, ids, mask

    def _limited(self, source: str, ids: list[int]) -> list[int] | None:
        """The response, cut if that is allowed, or None if it is too long."""
        limit = self._spec.max_response_tokens
        if len(ids) <= limit:
            return ids
        if not self._spec.truncate_responses:
            return None
        self._tally.notes[source, TRUNCATED] += 1
        return ids[:limit]
