"""Imports and exports checkpoints of other libraries; each format is a module.

A format's module has:
  recognises(path) -> bool                  whether the file or folder has this format
  open_foreign(path) -> Foreign             its contents; loads nothing
  write(output, model, tensors, companions) writes our parameters in this format, tensor by tensor; also copies the
                                            companion files, such as a tokenizer's, if the format has them
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from alignment_gap.checkpoints.adapters import plain_tensors
from alignment_gap.checkpoints.layout import (
    TOKENIZER,
    Stored,
    find_checkpoint,
    known_network,
    open_checkpoint,
    pad_token,
    read_digest,
    tokenizer_of,
    watched,
    write_checkpoint,
)
from alignment_gap.checkpoints.network import Network, check_policy
from alignment_gap.checkpoints.rewards import has_linear_reward, with_head
from alignment_gap.checkpoints.tensors import Entries, Tensor, check_entries, check_shapes, imported, shapes_of
from alignment_gap.configuration import to_dict
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, copy_files, whole_path
from alignment_gap.models import ModelConfig, RewardHead, abstract_parameters, make_policy
from alignment_gap.models.reward_head import make_init, without_output
from alignment_gap.sharding import unbox
from alignment_gap.storage import Url

FORMATS = {
    "huggingface": "alignment_gap.checkpoints.huggingface",
    "t5x": "alignment_gap.checkpoints.t5x",
    "t5x-legacy": "alignment_gap.checkpoints.t5x_legacy",
    "t5x-file": "alignment_gap.checkpoints.t5x_file",
}
# The format that has reward models.
REWARDS = "huggingface"
# The format of adapters without their base. Its module has `open_adapters`, and its `write` takes other arguments.
PEFT = "peft"
_ADAPTERS = {PEFT: "alignment_gap.checkpoints.huggingface.peft"}
# The formats whose folders have a model card, with the library that loads them.
WITH_CARD = {"huggingface": "transformers", PEFT: "peft"}


class Foreign(NamedTuple):
    """An open checkpoint in another format; nothing is loaded yet.

    Attributes:
      model: the network, from the checkpoint's config or tensors.
      tensors: all its tensors, by their names in this format.
      entries: how the tensors map to our parameters.
      ignored: names of tensors that may be present and are not used.
      companions: files that belong to the tensors, such as a tokenizer's.
      head: how a reward model reads a response; None for a policy.
    """

    model: ModelConfig
    tensors: Mapping[str, Tensor]
    entries: Entries
    ignored: Collection[str] = ()
    companions: Collection[Path] = ()
    head: RewardHead | None = None

    @property
    def kind(self) -> str:
        """The kind of the network: a policy, or a Bradley-Terry model with a head."""
        return "policy" if self.head is None else "bradley_terry"


def import_checkpoint(
    path: Path,
    output: Path,
    name: str | None = None,
    tokenizer_digest: Callable[[Path], str | None] = lambda folder: None,
    base: AnyPath | None = None,
) -> Stored:
    """Writes a checkpoint of another format to the run folder `output`, as its step 0, tensor by tensor.

    Args:
      path: the file or folder to import.
      output: the new folder; training can start from it, and `load_policy` can load it.
      name: name of the format; None detects it.
      tokenizer_digest: maps a folder of tokenizer files to the digest of its vocabulary, or None if it is not usable.
      base: the run with the base of PEFT adapters; for PEFT only.

    Raises:
      UserError: the format is unknown, or tensors are wrong, missing or unexpected. Raised before anything is loaded.
    """
    if output.exists():
        raise UserError(f"{output} exists already: give a new folder")
    try:
        return _import(path, output, name, tokenizer_digest, base)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # All of it is of this import, and the same command can run again.
        raise


def _import(
    path: Path,
    output: Path,
    name: str | None,
    tokenizer_digest: Callable[[Path], str | None],
    base: AnyPath | None,
) -> Stored:
    if name == PEFT or (name is None and _module(PEFT).recognises(path)):
        return _import_adapters(path, output, base)
    if base is not None:
        raise UserError(f"base is {base}, but {path} holds no adapters of PEFT: leave base out")
    source = open_foreign(path, name)
    tensors = imported(source.tensors, source.entries)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(str(path), shapes, model_shapes(source.model, source.head))
    tokenizer, digest = output / TOKENIZER, None
    if source.companions:
        tokenizer.mkdir(parents=True)
        for file in source.companions:
            shutil.copyfile(file, tokenizer / file.name)
        digest = tokenizer_digest(tokenizer)
    vocabulary = str(tokenizer) if digest else None
    network = Network(source.kind, source.model, vocabulary=vocabulary, vocabulary_digest=digest, head=source.head)
    write_checkpoint(output, 0, network, tensors)
    return open_checkpoint(output)


def _import_adapters(path: Path, output: Path, base: AnyPath | None) -> Stored:
    """Writes PEFT adapters as the checkpoint of a run; their base is another run."""
    if base is None:
        raise UserError(f"{path} holds adapters of PEFT: give base, the run that they are for, by --base=RUN")
    folder = find_checkpoint(base)
    network, tokenizer = known_network(folder), tokenizer_of(folder)
    if _module(PEFT).has_head(path):
        model, head = without_output(network.model), network.head or RewardHead(pad_token(tokenizer))
        network = dataclasses.replace(network, kind="bradley_terry", model=model, markers=(), head=head)
    else:
        check_policy(network, str(base))
    try:
        source = _module(PEFT).open_adapters(path, network.model, network.head)
    except UserError as error:
        raise UserError(f"{error} (the base is {base}; --base=RUN names another)") from error
    base_digest = read_digest(folder)
    network = dataclasses.replace(network, adapter=source.config, base=whole_path(folder), base_digest=base_digest)
    if tokenizer:
        copy_files(tokenizer, output / TOKENIZER)
    write_checkpoint(output, 0, network, source.tensors)
    return open_checkpoint(output)


def export_checkpoint(
    path: AnyPath,
    output: Path,
    name: str,
    step: int | None = None,
    companions: Path | None = None,
    card: str | None = None,
) -> None:
    """Writes the network of our checkpoint in another format, tensor by tensor; `output` appears when it is complete.

    Adapters are merged into their base; the format "peft" writes the adapters alone. The format "huggingface" has
    reward models. Of any other preference model, the policy inside is written.

    Args:
      path: a run's folder, its checkpoints/, or the folder of a step.
      output: the new file or folder.
      name: name of the format.
      step: step of the checkpoint; None for the last.
      companions: a folder with files that belong to the tensors, such as a tokenizer's; None uses the run's files.
      card: text of the README.md of the new folder, for the formats in `WITH_CARD`; None for no such file.

    Raises:
      UserError: the format is unknown or cannot hold the policy, or the checkpoint or the base of its adapters is
        damaged.
    """
    if output.exists():
        raise UserError(f"{output} exists already: give a new name")
    if companions and not companions.is_dir():
        raise UserError(f"{companions} is no folder: give the one that holds the tokenizer's files")
    module = _module(name)
    folder = find_checkpoint(path, step)
    network, stored = known_network(folder), open_checkpoint(folder)
    if name == PEFT and network.adapter is None:
        raise UserError(f"{folder} holds no adapters: choose one of {', '.join(FORMATS)}")
    if name not in (REWARDS, PEFT) and network.head is not None:
        raise UserError(f"{folder} is a reward model with a head, which {name} has no place for: choose {REWARDS}")
    shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
    check_shapes(str(folder), shapes, shapes_of(unbox(abstract_parameters(network.init))))
    checks: list[Callable[[], None]] = []

    def watch(read: Stored) -> Stored:
        read, check = watched(read)
        checks.append(check)
        return read

    with _completing(output) as partial, tempfile.TemporaryDirectory() as made_in:
        tokenizer = tokenizer_of(folder)
        if isinstance(tokenizer, Url):
            copy_files(tokenizer, tokenizer := Path(made_in))
        if name == PEFT:
            module.write(partial, network.model, network.adapter, watch(stored).tensors, network.head)
        elif name == REWARDS and (network.head is not None or has_linear_reward(network)):
            scored, tensors = with_head(network, plain_tensors(stored, watch))
            module.write(partial, scored.model, tensors, companions or tokenizer, head=scored.head)
        else:
            module.write(partial, network.model, plain_tensors(stored, watch), companions or tokenizer)
        for check in checks:  # As a restore does: a damaged array can be read without an error.
            check()
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")


@contextlib.contextmanager
def _completing(output: Path) -> Iterator[Path]:
    """A place for the file or folder that becomes `output` if no error is raised; nothing else is left behind."""
    partial = output.with_name(output.name + ".partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)  # A killed export leaves it.
    try:
        yield partial
        os.replace(partial, output)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_foreign(path: Path, name: str | None = None) -> Foreign:
    """Opens a checkpoint of another format, and checks that all tensors are there in the right shapes; loads nothing.

    Raises:
      UserError: the format is unknown, or tensors are wrong, missing or unexpected.
    """
    names = [name] if name else [known for known in FORMATS if _module(known).recognises(path)]
    if not path.exists() and names != ["huggingface"]:  # A missing path may name a repository on the hub.
        raise UserError(f"{path} does not exist: give the file or folder of a checkpoint")
    if not names:
        raise UserError(f"{path} is in no known format: the formats are {', '.join(FORMATS)}")
    source = _module(names[0]).open_foreign(path)
    check_entries(str(path), source.tensors, source.entries, source.ignored)
    return source


def describe(path: AnyPath) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """The description of a checkpoint, ours or of another format, and its tensors by their own names.

    Raises:
      UserError: the path holds no checkpoint, or a damaged one.
    """
    names = [name for name in FORMATS if isinstance(path, Path) and _module(name).recognises(path)]
    if names and isinstance(path, Path):
        source = open_foreign(path, names[0])
        head = {} if source.head is None else {"kind": source.kind, "head": to_dict(source.head)}
        return {"format": names[0], **head, "model": to_dict(source.model)}, source.tensors
    stored = open_checkpoint(path)
    network = to_dict(stored.network) if stored.network else {"network": "it does not say"}
    return {"checkpoint": str(stored.folder), **network}, stored.tensors


def model_shapes(model: ModelConfig, head: RewardHead | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a policy, or of a reward model, by dotted names, without allocating them."""
    policy = make_policy(model)
    return shapes_of(unbox(jax.eval_shape(policy.init if head is None else make_init(policy, head), jax.random.key(0))))


def _module(name: str) -> Any:
    known = FORMATS | _ADAPTERS
    if name not in known:
        raise UserError(f"format {name!r} is unknown: choose one of {', '.join(known)}")
    return importlib.import_module(known[name])
