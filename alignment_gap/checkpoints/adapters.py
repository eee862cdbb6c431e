"""Checkpoints of adapters: find their base, and read base and adapters as plain parameters, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from alignment_gap.checkpoints.layout import Stored, find_checkpoint, open_checkpoint, read_digest
from alignment_gap.checkpoints.network import Network
from alignment_gap.checkpoints.tensors import Tensor
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at
from alignment_gap.models.adapters import input_axes
from alignment_gap.models.policy import HEAD, OUTPUT
from alignment_gap.models.quantized import INT8, rounded


def base_of(folder: AnyPath, network: Network) -> AnyPath:
    """The base checkpoint of the adapters in a step's folder.

    Raises:
      UserError: the base is missing, or its parameters have changed.
    """
    try:
        base = find_checkpoint(at(str(network.base)))
        found = read_digest(base)
    except (OSError, UserError) as error:
        raise UserError(
            f"{folder} holds adapters of the base {network.base}, which cannot be read: put it back ({error})"
        ) from error
    if found != network.base_digest:
        raise UserError(
            f"{folder} holds adapters of another base: {network.base} had the digest {str(network.base_digest)[:12]} "
            f"and now has {str(found)[:12]}: put the base back"
        )
    return base


def plain_tensors(stored: Stored, watch: Callable[[Stored], Stored] = lambda stored: stored) -> dict[str, Tensor]:
    """A checkpoint's parameters with plain kernels; reading a kernel adds its adapter to the base's kernel.

    Kernels that the adapters' run held in int8 have the values of int8. `watch` is applied to the checkpoint and to
    every base, before anything is read.
    """
    stored = watch(stored)
    network = stored.network
    if network is None or network.adapter is None:
        return stored.tensors
    base, scale = plain_tensors(open_checkpoint(base_of(stored.folder, network)), watch), network.adapter.scale
    if network.adapter.base_dtype == INT8:
        base = base | {name: _rounded(base[name], inputs) for name, inputs in input_axes(network.policy()).items()}
    kernels = [name.removesuffix(".a") for name in stored.tensors if name.endswith(".a")]
    whole = base | {name: _sum(base[name], stored.tensors, name, scale) for name in kernels}
    if network.head is None:
        return whole
    head = {name: tensor for name, tensor in stored.tensors.items() if _stack(name) == HEAD}
    return {name: tensor for name, tensor in whole.items() if _stack(name) not in (HEAD, OUTPUT)} | head


def _stack(name: str) -> str:
    return name.partition(".")[0]


def _rounded(kernel: Tensor, inputs: int) -> Tensor:
    def read(layer: int | None) -> np.ndarray:
        values = kernel.read(layer)
        return np.asarray(rounded(values, inputs) if layer is None else rounded(values[None], inputs)[0])

    return kernel._replace(read=read)


def _sum(kernel: Tensor, adapters: Mapping[str, Tensor], name: str, scale: float) -> Tensor:
    def read(layer: int | None) -> np.ndarray:
        if layer is None:
            return np.stack([read(each) for each in range(kernel.shape[0])])
        a, b = (adapters[f"{name}.{part}"].read(layer) for part in "ab")
        return kernel.read(layer) + np.float32(scale) * np.tensordot(a, b, axes=1)

    return kernel._replace(read=read)
