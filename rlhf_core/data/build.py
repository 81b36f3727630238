"""The data stage: sources -> examples -> shares by prompt -> token ids on disk. One process, no torch.

Read: every row becomes an example or a counted drop, and goes as text to the file of its share and split. Tokenise:
batch by batch to rows of ids. Sample: pairs for the reward share where the data has none. Leaves `tokenizer/`,
`{sft,reward,ppo}/{train,test}/` (no folder for a share of weight 0), `ptx/train/` where there is pretraining text, and
`report.json`. Rows keep the order in which they were read; trainers shuffle. All that grows with the rows in memory
is a digest of each row and each prompt (up to 21 bytes); texts and ids are in files.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_core.context import JobContext
from rlhf_core.data import tokenizer as tokenizers
from rlhf_core.data.chat_format import ChatFormat, write_chat_template
from rlhf_core.data.digests import DigestTable
from rlhf_core.data.encode import Encoder
from rlhf_core.data.examples import SourceReader
from rlhf_core.data.formats import Example
from rlhf_core.data.pretrain import PretrainText
from rlhf_core.data.readers import AnySource, Read, check_places
from rlhf_core.data.rows import REPEATED, RowMaker, Tally
from rlhf_core.data.sample import check_sampling, sample_pairs
from rlhf_core.data.split import PLACES, SHARES, Share, Split, Splitter, copies
from rlhf_core.data.tables import Draft, DraftFile, RowFile
from rlhf_core.data.template import Dropped, Reason, Template
from rlhf_core.errors import DataError
from rlhf_core.specs import DataSpec

REPORT_ROWS = 10_000  # rows between two reports of progress while reading
Place = tuple[Share, Split]


def run(context: JobContext) -> dict[str, Any]:
    """Build the data artifact in `context.out`.

    Returns:
        Metrics for the manifest: rows read, dropped by reason, rows and tokens of each split.

    Raises:
        ConfigError: a place or an option is wrong; found before anything is read.
        DataError: a file is damaged, a column is missing, or a share is empty.
    """
    return DataStage(context).build()


class DataStage:
    """The state of one build."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.spec = DataSpec.model_validate(context.job.spec)
        self.tally = Tally()
        self.splitter = Splitter(context.seed, self.spec.shares)
        self.seen = DigestTable()
        self.style = ChatFormat()
        self.pretrain: PretrainText | None = None
        self.unpaired = 0
        self.sampled: dict[str, float] = {}
        _use_threads(context.job.resources.data_workers)

    def build(self) -> dict[str, Any]:
        """All passes; the metrics."""
        check_places(self.spec)
        check_sampling(self.spec, self.context.job.model)
        tokenizer = tokenizers.make_tokenizer(self.spec, self.context.job.model)
        template = Template(self.spec.template, tokenizer)
        with tempfile.TemporaryDirectory(prefix="rlhf-drafts-", dir=self.context.scratch) as folder:
            drafts = {place: DraftFile(Path(folder, "-".join(place))) for place in PLACES}
            self.read(template, drafts)
            if self.spec.tokenizer.train_vocab_size is not None:
                self.context.progress(0, 1, "train tokenizer")
                tokenizer = tokenizers.train(_training_texts(drafts), self.spec.tokenizer)
            encoder = Encoder(tokenizer, chat=self.spec.template == "chat")
            write_chat_template(tokenizer, self.spec, self.style, encoder)
            tokenizer.save_pretrained(self.context.out / "tokenizer")
            files = {place: RowFile(Path(folder, "-".join((*place, "rows"))), place[0]) for place in PLACES}
            self.encode(tokenizer, encoder, drafts, files)
            splits = {"/".join(p): file.save(self.context.out.joinpath(*p)) for p, file in files.items()}
            if self.spec.pretrain is not None:
                splits["ptx/train"] = self.write_pretrain(template, encoder, Path(folder, "ptx"))
        self.check_filled(splits)
        return self.report(tokenizer, splits)

    # Pass 1: text.

    def read(self, template: Template, drafts: dict[Place, DraftFile]) -> None:
        """Every row of every source to a draft in its place, or to a counted drop."""
        for i, source in enumerate(self.spec.sources):
            field = f"data.sources[{i}]"
            reader = SourceReader(source, field, self.context.seed, template)
            for row in reader.rows:
                self.tally.read[row.source] += 1
                try:
                    place, draft, times = self.place(row, reader.example(row), source)
                    for _ in range(times):
                        drafts[place].add_draft(draft)
                except Dropped as drop:
                    self.tally.drop(row.source, drop.reason)
                count = self.tally.read.total()
                if count % REPORT_ROWS == 0:
                    self.context.progress(count, count, "read", unit="rows")
        for file in drafts.values():
            file.close()

    def place(self, row: Read, example: Example, source: AnySource) -> tuple[Place, Draft, int]:
        """Where an example goes and how often; Dropped if it goes nowhere or has been there."""
        feeds = set(feedable(example, sampled=self.spec.sampled_pairs is not None)) & set(source.feeds or SHARES)
        place = self.splitter.assign(example.prompt_text, feeds, row.side)
        key = _identity(place[0], example)
        if self.seen.get(key):
            raise Dropped(Reason.DUPLICATE)
        times = copies(self.context.seed, example.prompt_text, source.weight) if place[1] == "train" else 1
        if not times:
            raise Dropped(Reason.WEIGHT)
        self.seen.put(key, 1)
        if place[0] == "reward" and example.chosen is None:
            assert self.spec.sampled_pairs is not None
            if self.unpaired == self.spec.sampled_pairs.max_prompts:
                raise Dropped(Reason.UNSAMPLED)
            self.unpaired += 1
        if times > 1:
            self.tally.notes[row.source, REPEATED] += times - 1
        self.style.observe(example)
        return place, Draft(row.source, example), times

    # Passes 2 and 3: token ids.

    def encode(
        self, tokenizer: Any, encoder: Encoder, drafts: dict[Place, DraftFile], files: dict[Place, RowFile]
    ) -> None:
        """Every draft to a row of ids, or to a counted drop; then pairs for prompts that have none."""
        maker = RowMaker(encoder, self.spec, self.tally)
        done, total = 0, sum(file.rows for file in drafts.values())
        unpaired: list[tuple[Place, dict[str, Any]]] = []
        for place, file in drafts.items():
            for batch in file.batches():
                rows = maker.of(place[0], batch)
                files[place].add_rows([row for row in rows if not _lacks_pair(row)])
                unpaired += [(place, row) for row in rows if _lacks_pair(row)]
                done += len(batch)
                self.context.progress(done, total, "tokenise", unit="rows")
        if unpaired:
            pairs, self.sampled = sample_pairs(
                self.context, self.spec, tokenizer, encoder, [row for _, row in unpaired]
            )
            for (place, row), pair in zip(unpaired, pairs, strict=True):
                if pair is None:
                    self.tally.drop(row["source"], Reason.TIE)
                else:
                    files[place].add_rows([pair])

    def write_pretrain(self, template: Template, encoder: Encoder, path: Path) -> dict[str, Any]:
        """The blocks of pretraining text; rows and tokens."""
        self.pretrain = PretrainText(self.spec, self.context.seed, template, encoder, self.splitter)
        file = RowFile(path, "ptx")
        self.pretrain.write(file, lambda rows: self.context.progress(rows, rows, "pretraining text", unit="rows"))
        return file.save(self.context.out / "ptx" / "train")

    # What it came to.

    def check_filled(self, splits: dict[str, dict[str, Any]]) -> None:
        """DataError if a share that is wanted has no rows for training or for tests."""
        for share, split in PLACES:
            weight = self.splitter.weights[share]
            if weight == 0 or splits[f"{share}/{split}"]["rows"]:
                continue
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.tally.reasons().items()) or "none"
            shares = ", ".join(f"{name} {data['rows']}" for name, data in splits.items())
            remedy = (
                "relax the limits" if split == "train" else f"raise data.shares.test (is {self.spec.shares.test:g})"
            )
            if share == "reward" and not splits["reward/train"]["rows"]:
                remedy = "give a source with chosen and rejected, set data.sampled_pairs"
            raise DataError(
                f"data.shares.{share} is {weight:g}, but its {split} split has no rows. Rows read: "
                f"{self.tally.read.total()}; dropped: {reasons}; kept: {shares}. Give more data, {remedy}, or set "
                f"data.shares.{share} to 0"
            )

    def report(self, tokenizer: Any, splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Write report.json; returns the metrics."""
        prompts = self.splitter.prompts()
        everything = max(sum(prompts.values()), 1)
        content = {
            "sources": self.tally.by_source(),
            "splits": splits,
            "prompts": {name: {"count": n, "share": round(n / everything, 4)} for name, n in prompts.items()},
            "tokenizer": {
                "tokens": len(tokenizer),
                "pad": {"token": tokenizer.pad_token, "id": tokenizer.pad_token_id},
                "eos": {"token": tokenizer.eos_token, "id": tokenizer.eos_token_id},
            },
        }
        if self.sampled:
            content["sampled_pairs"] = self.sampled
        if self.pretrain is not None:
            content["pretrain"] = self.pretrain.report()
        (self.context.out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
        dropped = self.tally.reasons()
        repeated = sum(count for (_, note), count in self.tally.notes.items() if note == REPEATED)
        for name, data in splits.items():
            self.context.say(f"{name}: {data['rows']} rows, {data['tokens']} tokens")
        if dropped:
            self.context.say("dropped: " + ", ".join(f"{reason} {count}" for reason, count in dropped.items()))
        return {
            "rows_read": self.tally.read.total(),
            "rows_kept": sum(splits["/".join(place)]["rows"] for place in PLACES),
            "dropped": dropped,
            "splits": {name: {"rows": data["rows"], "tokens": data["tokens"]} for name, data in splits.items()},
            "vocabulary": len(tokenizer),
            **({"rows_repeated": repeated} if repeated else {}),
            **self.sampled,
        }


def feedable(example: Example, sampled: bool) -> list[Share]:
    """The shares an example has something for; any prompt feeds ppo, and reward too if pairs are sampled."""
    feeds: list[Share] = ["ppo"]
    if example.chosen is not None or sampled:
        feeds.append("reward")
    if example.answer is not None or example.chosen is not None:
        feeds.append("sft")
    return feeds


def _identity(share: Share, example: Example) -> bytes:
    """Digest of what the share keeps of an example; two rows with the same one are duplicates."""
    texts = [share, example.prompt_text]
    if share == "sft":
        texts.append(example.answer or example.chosen or "")
    elif share == "reward":
        texts += [example.chosen or "", example.rejected or ""]
    return hashlib.sha256("\0".join(texts).encode()).digest()[:16]


def _lacks_pair(row: dict[str, Any]) -> bool:
    """Whether a row of the reward share is only a prompt; rows of other shares have no such column."""
    return row.get("chosen_ids") == []


def _training_texts(drafts: dict[Place, DraftFile]) -> Iterator[str]:
    """Texts to train a tokenizer on: those of the train splits, cut as they will be encoded."""
    for (_, split), file in drafts.items():
        for draft in chain.from_iterable(file.batches()) if split == "train" else ():
            example = draft.example
            yield from (turn.text for turn in example.prompt)
            yield from (text for text in (example.answer, example.chosen, example.rejected) if text)


def _use_threads(workers: int | None) -> None:
    """How many threads the tokenizers library takes; it reads these once, when it first encodes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
