"""Loads a vocabulary by its name or the path of its file."""

from __future__ import annotations

from alignment_gap.data.text import posts
from alignment_gap.data.text.vocabulary import (
    BYTES,
    KINDS,
    POSTS,
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    WordVocabulary,
    read_bytes,
)
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at


def load_vocabulary(path: str | AnyPath, extra_ids: int | None = None) -> Vocabulary:
    """The vocabulary of a file, of a folder, or of a name.

    Args:
      path: "bytes" for ByT5's; "posts" for the words of the built-in posts; a SentencePiece `*.model`; a
        `tokenizer.json`; a `*.txt` with a word on each line; or a folder, such as a checkpoint, with a `tokenizer.json`
        or a SentencePiece model in it.
      extra_ids: number of sentinels added to a SentencePiece model; None for its convention. Ignored for other kinds.

    Raises:
      UserError: the file is missing, is of an unknown kind, or its content does not match its name.
    """
    if str(path) == BYTES:
        return ByteVocabulary()
    if str(path) == POSTS:
        return posts.vocabulary()
    path = at(path)
    path = _in_folder(path) if path.is_dir() else path
    if path.suffix == ".model":
        return SentencePieceVocabulary(path, extra_ids)
    if path.suffix == ".json":
        from alignment_gap.data.text.tokenizer_vocabulary import TokenizerVocabulary

        return TokenizerVocabulary(path)
    if path.suffix == ".txt":
        try:
            return WordVocabulary(read_bytes(path).decode("utf-8").split())
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text: save the word list as UTF-8") from None
    raise UserError(f"{path} is not a known kind of vocabulary: give {KINDS}")


def tokenizer_digest(folder: AnyPath) -> str | None:
    """The digest of the vocabulary in a folder of tokenizer files; None if it has no usable vocabulary."""
    try:
        return load_vocabulary(folder).digest
    except UserError:
        return None


def _in_folder(folder: AnyPath) -> AnyPath:
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model"):
        if (folder / name).exists():
            return folder / name
    models: list[AnyPath] = [*folder.glob("*.model")]
    if len(models) != 1:
        raise UserError(f"{folder} holds no vocabulary: give {KINDS}")
    return models[0]
