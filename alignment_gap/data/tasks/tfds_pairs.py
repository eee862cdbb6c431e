"""A tensorflow-datasets builder for the paper's four tasks, which TFDS itself lacks; imports TensorFlow.

    import alignment_gap.data.tasks.tfds_pairs
    builder = tfds.builder("alignment_pairs/harmlessness")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir="downloads"))

`downloads/harmlessness/` holds the publisher's files, in any form that a source can have. The builder does not download
anything itself.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from alignment_gap.data.text import Dropped, TextPair, TextSource, TextSourceConfig, held_out, open_source
from alignment_gap.errors import UserError

VALIDATION_FRACTION = 0.05
NAME, VERSION = "alignment_pairs", "1.0.0"
_TASKS = {
    "summarization": ("OpenAI's TL;DR comparisons: batch*.json", "https://arxiv.org/abs/2009.01325"),
    "helpfulness": ("Anthropic's helpful dialogues: train.jsonl.gz, test.jsonl.gz", "https://arxiv.org/abs/2204.05862"),
    "harmlessness": (
        "Anthropic's harmless dialogues: train.jsonl.gz, test.jsonl.gz",
        "https://arxiv.org/abs/2204.05862",
    ),
    "chat_arena": ("LMSYS's chatbot_arena_conversations: *.parquet", "https://arxiv.org/abs/2306.05685"),
}
TASKS = tuple(_TASKS)


class AlignmentPairs(tfds.core.GeneratorBasedBuilder):
    """Prompt, chosen and rejected response as text, and the probability that the chosen one is better.

    The splits are the publisher's if there are two; otherwise the hash of the prompt decides. Prompts of the validation
    split are not in training pairs. `info.metadata` counts the dropped records.
    """

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=text) for name, (text, _) in _TASKS.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the publisher's files, or a folder that Hugging Face's save_to_disk wrote, into manual_dir/TASK/."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        text, homepage = _TASKS[self.builder_config.name]
        names = ("prompt", "chosen", "rejected")
        features = {name: tfds.features.Text() for name in names} | {"preference": tf.float32}
        return tfds.core.DatasetInfo(
            builder=self,
            description=text,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=None,
            homepage=homepage,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        task = self.builder_config.name
        folder = pathlib.Path(dl_manager.manual_dir) / task
        source = open_source(TextSourceConfig(str(folder), task=task, bad_pairs="drop"))
        splits, dropped = _survey(source)
        for split in ("train", "validation"):
            if split not in splits:
                raise UserError(f"{folder} gives no pair of the split {split!r}: add the publisher's other files")
        self.info.metadata.update(dropped=dict(sorted(dropped.items())))
        return {split: self._generate_examples(source, splits, split) for split in ("train", "validation")}

    def _generate_examples(
        self, source: TextSource, splits: list[str | None], split: str
    ) -> Iterator[tuple[int, dict]]:
        for number, item in enumerate(source.read()):
            if splits[number] == split and isinstance(item, TextPair):
                order = (0, 1) if item.scores[0] >= item.scores[1] else (1, 0)
                chosen, rejected = (item.responses[k] for k in order)
                yield (
                    number,
                    {
                        "prompt": item.prompt,
                        "chosen": chosen,
                        "rejected": rejected,
                        "preference": item.scores[order[0]],
                    },
                )


def _survey(source: TextSource) -> tuple[list[str | None], collections.Counter[str]]:
    """The split of each item of the source, or None if it is left out; and the counts of the reasons."""
    items = [_outline(item, source) for item in source.read()]
    own = {"train", "validation"} <= {item.split for item in items}
    if not own:
        items = [dataclasses.replace(item, split=item.hashed_split) for item in items]
    # A pair in both splits stays in the validation split, whichever split is read first.
    seen: set[tuple[bytes, bool]] = set()
    held = {item.prompt for item in items if item.split == "validation" and not item.reason}
    splits, dropped = [], collections.Counter[str]()
    for item in items:
        reason, key = item.reason, (item.key, item.split == "validation")
        if not reason and source.drops_duplicates and key in seen:
            reason = "duplicate"
        if not reason and item.split != "validation" and item.prompt in held:
            reason = "prompt of the validation split"
        seen.add(key)
        dropped.update([reason] if reason else [])
        splits.append(None if reason else item.split or "train")
    return splits, dropped


@dataclasses.dataclass(frozen=True)
class _Item:
    """The facts that decide the split of one pair."""

    reason: str | None = None
    split: str | None = None
    hashed_split: str | None = None
    key: bytes = b""
    prompt: int = 0


def _outline(item: TextPair | Dropped, source: TextSource) -> _Item:
    if isinstance(item, Dropped):
        return _Item(reason=item.reason)
    hashed = "validation" if held_out(item.prompt.encode(), VALIDATION_FRACTION) else "train"
    return _Item(split=item.split, hashed_split=hashed, key=item.key, prompt=hash(item.prompt))
