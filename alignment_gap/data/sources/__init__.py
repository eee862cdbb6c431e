"""Sources: pairs as text from every place and form that people keep them in.

`open_source(SourceConfig(location, task, ...))` gives a `Source`; `Source.read(start, stop)` yields a `TextPair`, or
what was `Dropped` and why, for a range of its records; `encode_pair` makes token ids of one. `containers` reads files,
folders and datasets, `tasks` and `trl` their records, `chat` writes conversations as text.
"""

from alignment_gap.data.sources.encode import KEEP_END, Encoded, Limits, encode_pair, example_of, held_out
from alignment_gap.data.sources.pair import Dropped, TextPair
from alignment_gap.data.sources.reader import Source, SourceConfig, open_source, source_digest
from alignment_gap.data.sources.tasks import TASKS

__all__ = [
    "KEEP_END",
    "TASKS",
    "Dropped",
    "Encoded",
    "Limits",
    "Source",
    "SourceConfig",
    "TextPair",
    "encode_pair",
    "example_of",
    "held_out",
    "open_source",
    "source_digest",
]
