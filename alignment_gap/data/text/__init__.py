"""Text: pairs from files and datasets in many forms, and the vocabularies that encode them.

`open_source(TextSourceConfig(location, task, ...))` returns a `TextSource`. Its `read(start, stop)` yields a `TextPair`
for each record of a range, or `Dropped` with the reason. `encode_pair` turns a pair into token ids. `containers` reads
files, folders and datasets; `forms` and `trl` parse their records; `chat` writes conversations as text; `posts`
generates the built-in task, which needs no file.
"""

from alignment_gap.data.text.encode import KEEP_END, Encoded, Limits, encode_pair, held_out, prompt_ids, prompt_within
from alignment_gap.data.text.forms import TASKS
from alignment_gap.data.text.pair import Dropped, TextPair
from alignment_gap.data.text.posts import PostsConfig, PostsSettings
from alignment_gap.data.text.source import TextSource, TextSourceConfig, open_source, source_digest
from alignment_gap.data.text.vocabulary import (
    EncodingError,
    SentencePieceVocabulary,
    Vocabulary,
    WordVocabulary,
    extra_id,
)
from alignment_gap.data.text.vocabulary_loading import load_vocabulary

__all__ = [
    "KEEP_END",
    "TASKS",
    "Dropped",
    "Encoded",
    "EncodingError",
    "Limits",
    "PostsConfig",
    "PostsSettings",
    "SentencePieceVocabulary",
    "TextPair",
    "TextSource",
    "TextSourceConfig",
    "Vocabulary",
    "WordVocabulary",
    "encode_pair",
    "extra_id",
    "held_out",
    "load_vocabulary",
    "open_source",
    "prompt_ids",
    "prompt_within",
    "source_digest",
]
