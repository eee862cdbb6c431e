"""Reading and writing a folder of safetensors, tensor by tensor."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignment_gap.checkpoints.formats import Foreign
from alignment_gap.checkpoints.huggingface.configs import read_config, read_head, write_config
from alignment_gap.checkpoints.huggingface.entries import UNUSED, copies_of, entries_of, join_fused, split_fused
from alignment_gap.checkpoints.tensors import Tensor, exported
from alignment_gap.errors import UserError
from alignment_gap.models import ModelConfig, RewardHead, T5Config
from alignment_gap.models.reward_head import without_output

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Files that belong to a folder's tensors; an import and an export copy them.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The largest size of a file in bytes; then the next file begins. An export holds one file in memory.
SHARD_BYTES = 5_000_000_000


def recognises(path: Path) -> bool:
    """Whether `path` is a folder with a config.json, or looks like the id of a repository on the hub."""
    return (path / CONFIG).is_file() or (not path.parent.exists() and is_hub_id(path))


def open_foreign(path: Path) -> Foreign:
    """Opens a folder, or a repository of the hub by its id; reads no tensor yet.

    The config is checked before the tensors are downloaded.

    Raises:
      UserError: the folder is not available, or its config or a file of tensors is not usable.
    """
    is_on_hub = not path.exists() and is_hub_id(path)
    folder = _download(str(path), [CONFIG]) if is_on_hub else path
    values, place = read_json(folder / CONFIG), str(folder / CONFIG)
    head, model = read_head(values, place), read_config(values, place)
    model = model if head is None else without_output(model)
    if is_on_hub:
        folder = _download(str(path), [*COMPANIONS, INDEX, "*.safetensors"])
    tensors = split_fused(model, _tensors(folder))
    ignored = {name for name in tensors if name.endswith(UNUSED)}
    for name, original in copies_of(model, head).items():
        if name in tensors and original in tensors:
            _check_copy(folder, tensors, name, original)
            ignored.add(name)
    if isinstance(model, T5Config) and not model.tied_embeddings and "shared.weight" in tensors:
        # If version 1.1 lacks its output embedding, transformers uses the input embedding.
        tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    return Foreign(model, tensors, entries_of(model, head), ignored, companions_of(folder), head)


def write(
    output: Path,
    model: ModelConfig,
    ours: Mapping[str, Tensor],
    companions: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    head: RewardHead | None = None,
) -> None:
    """Writes a folder that transformers loads, in float32.

    Args:
      output: the new folder.
      model: the policy's config.
      ours: its parameters by dotted names; the parameters of one file are in memory at a time.
      companions: a folder with tokenizer files to copy; its config.json and generation_config.json provide settings
        that a policy does not have.
      shard_bytes: the largest size of a file in bytes; then the next file begins.
      head: how a reward model with a head reads a response; None for a policy.

    Raises:
      UserError: transformers has no architecture that computes the same as the policy.
    """
    save_file = installed("safetensors.numpy").save_file
    there = companions_of(companions) if companions else []
    like = next((read_json(file) for file in there if file.name == CONFIG), None)
    config = write_config(model, like, head)
    tensors = join_fused(model, exported(ours, entries_of(model, head)))
    output.mkdir(parents=True)
    shards = list(_shards(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {name: tensors[name].read(None).astype(np.float32, copy=False) for name in names}
        save_file(arrays, output / file, metadata={"format": "pt"})
        del arrays
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(map(_bytes, tensors.values()))
        write_json(output / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    for companion in there:
        shutil.copyfile(companion, output / companion.name)
    write_json(output / CONFIG, config)


def companions_of(folder: Path) -> list[Path]:
    """The files of a folder that belong to its tensors: the tokenizer's files and the configs."""
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; raises UserError if the file holds no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): give a folder that has it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: it is damaged")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object as a JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def is_hub_id(path: Path | str) -> bool:
    """Whether a path or a name has the form of a repository of the hub, OWNER/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) is not None


def _download(name: str, files: list[str]) -> Path:
    """The local folder of a repository of the hub; downloads the files, given by patterns, if needed."""
    hub = installed("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is no folder, and the hub does not give it ({str(error).strip().splitlines()[0]}): give the path "
            "of a folder, or fetch it where there is a network"
        ) from error


def installed(module: str) -> Any:
    """A module from the extra `huggingface`; raises UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f'Hugging Face folders need {module.split(".")[0]}: pip install "alignment-gap[huggingface]"'
        ) from error


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder: of its single file, as in transformers, or of the files that its index names."""
    if (folder / WEIGHTS).is_file():
        return tensors_of(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        remedy = f"there is {there}: save it again in transformers, as safetensors" if there else "give a whole one"
        raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}: {remedy}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{folder / INDEX}: weight_map does not map tensors to files: fetch the folder again")
    for name, file in weight_map.items():
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing, which has {name}: fetch the folder again")
    found: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        # A file may hold an old copy of a tensor that the index has in another file.
        of_file = tensors_of(folder / file)
        found |= {name: tensor for name, tensor in of_file.items() if weight_map.get(name, file) == file}
    return found


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a file; each read opens the file again, so that at most one tensor is mapped into memory."""
    safetensors = installed("safetensors")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{_damage(file) or f'{file} is no file of safetensors ({error})'}: fetch it again") from error
    for name, (shape, dtype) in found.items():
        if dtype not in DTYPES and not name.endswith(UNUSED):
            raise UserError(
                f"{file}: {name} of the shape {shape} is {dtype}, which is not supported: save it as "
                f"{' or '.join(DTYPES)}; quantised models are not supported"
            )
    return {
        name: Tensor(shape, DTYPES.get(dtype, dtype), partial(_read, file, name))
        for name, (shape, dtype) in found.items()
    }


def _read(file: Path, name: str, _: None = None) -> np.ndarray:
    with installed("safetensors").safe_open(file, framework="numpy") as opened:
        return opened.get_tensor(name)


def _damage(file: Path) -> str:
    """A line about the first tensor that a truncated file lacks; "" if the file is not truncated."""
    try:
        content = file.stat().st_size
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        there = content - 8 - size
        ends = sorted((row["data_offsets"][1], name, row["shape"]) for name, row in header.items() if "shape" in row)
        return next(
            f"{file} is cut short: {name} of the shape {tuple(shape)} ends at byte {end} of its {there}"
            for end, name, shape in ends
            if end > there
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, MemoryError, OverflowError):
        return ""


def _check_copy(folder: Path, tensors: Mapping[str, Tensor], name: str, original: str) -> None:
    """Raises UserError if two tensors that the model ties are not equal."""

    def digest(tensor: Tensor) -> bytes:
        return hashlib.sha256(tensor.read(None).view(np.uint8).data).digest()

    copy, tensor = tensors[name], tensors[original]
    if copy.shape != tensor.shape or digest(copy) != digest(tensor):
        raise UserError(
            f"{folder}: {name} of the shape {copy.shape} differs from {original} of the shape {tensor.shape}, but the "
            "config ties them: if they should differ, set tie_word_embeddings to false"
        )


def _bytes(tensor: Tensor) -> int:
    return 4 * math.prod(tensor.shape)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """The tensors' names for each file, with layers in order."""
    names: list[str] = []
    size = 0
    for name in sorted(tensors, key=lambda name: [part.zfill(6) for part in name.split(".")]):
        if names and size + _bytes(tensors[name]) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(tensors[name])
    yield names
