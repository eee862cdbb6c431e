"""Examples and datasets of the built-in posts, as `data prepare` makes them, for tests that read datasets."""

import pathlib

from alignment_gap.configuration import to_dict
from alignment_gap.data.records import Card, Example, write_dataset
from alignment_gap.data.tasks.prepare import PrepareConfig, example_of
from alignment_gap.data.text import PostsConfig, TextSourceConfig, encode_pair, load_vocabulary, open_source


def posts_examples(count: int, seed: int = 0, first: int = 0) -> list[Example]:
    """The training pairs `first` to `first + count` of the world with this seed."""
    config = _config(first + count, seed)
    pairs = open_source(config.source).read(first, first + count)
    return [example_of(encode_pair(pair, load_vocabulary("posts"), config.limits)) for pair in pairs]


def write_posts(folder: str | pathlib.Path, count: int, seed: int = 0) -> Card:
    """Writes a dataset of the first training pairs, with the provenance that `data prepare` gives it."""
    unsaid = ("workers", "end_prompts")
    settings = {name: value for name, value in to_dict(_config(count, seed)).items() if name not in unsaid}
    provenance = {"made_by": "prepare", **settings, "split": "train"}
    digest = load_vocabulary("posts").digest
    return write_dataset(folder, posts_examples(count, seed), vocabulary_digest=digest, provenance=provenance)


def _config(pairs: int, seed: int) -> PrepareConfig:
    source = TextSourceConfig("posts", posts=PostsConfig(pairs=pairs, validation_pairs=1, seed=seed))
    return PrepareConfig(source, vocabulary="posts")
