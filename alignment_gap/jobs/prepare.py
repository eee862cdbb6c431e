"""The job that prepares datasets from text; `data.tasks.prepare` does the work."""

from __future__ import annotations

from alignment_gap import __version__
from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import END_PROMPTS, counted_lines, ends_prompts, lengths_text
from alignment_gap.data.records.dataset import CARD
from alignment_gap.data.tasks.prepare import PREVIEW, PrepareConfig, may_change, open_preparation
from alignment_gap.folders import JOB, AnyPath
from alignment_gap.jobs.folder import Kind, Opened
from alignment_gap.progress import OpenBar
from alignment_gap.sharding import on_first_process

# Shorter flags of a source: in a `TextSourceConfig` by itself, and in a `PrepareConfig`.
SOURCE_FLAGS = {"location": "source"}
_FLAGS = {"source.location": "source", "source.": "", "limits.": ""}


def open_preparing(config: PrepareConfig) -> Opened:
    """Opens the source and the vocabulary; raises UserError if one of them cannot be used."""
    preparation = open_preparation(config)

    def run(folder: AnyPath, open_bar: OpenBar) -> None:
        # If there are several processes, only the first prepares, with its own workers.
        on_first_process(lambda: preparation.write(folder, open_bar=open_bar))

    # None if prompts have no end id. Folders of earlier versions lack this fact, and stay valid.
    ends = preparation.ends_prompts or None
    return Opened({**preparation.digests, "version": __version__, END_PROMPTS: ends}, run)


def _summary(folder: AnyPath) -> str:
    lines = []
    for card_path in sorted(folder.glob(f"*/{CARD}")):
        card = open_dataset(card_path.parent).card
        lines.append(f"{card_path.parent}: {card.count:,} examples")
        lines += [f"  {name}s: {lengths_text(card.lengths[name])} tokens" for name in ("prompt", "response")]
        lines += [f"  {line}" for line in counted_lines(card.provenance)]
        if cut := card.provenance["cut_prompts"]:
            lines.append(f"  cut to their last tokens: {cut:,} prompts")
    dataset = open_dataset(card_path.parent)
    written = dataset.card.provenance["source"]["template"]
    lines += [f"conversations are written with the template {written}"] if written else []
    lines += ["every prompt ends with the end id"] if ends_prompts(dataset) else []
    return "\n".join([*lines, f"preview: {folder / PREVIEW}"])


PREPARE = Kind(
    name="prepare",
    command="data prepare",
    config=PrepareConfig,
    open=open_preparing,
    summary=_summary,
    short=_FLAGS,
    may_change=lambda folder: may_change(folder, folder / JOB),
    without_effect=("workers",),
    repairs=True,
)
