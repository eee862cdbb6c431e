"""The reference policy's log-probs of a dataset: computed once, stored beside it, found again by what they are of."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt

from alignment_gap.configuration import to_dict
from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.buckets import Bucket
from alignment_gap.data.batches.offline import offline_source
from alignment_gap.data.batches.prefetch import Prefetched
from alignment_gap.data.records.dataset import Dataset
from alignment_gap.data.records.log_probs import ReferenceLogProbs, ReferenceWriter, open_reference, reference_folder
from alignment_gap.folders import locked
from alignment_gap.models import Policy
from alignment_gap.sharding import LogicalMesh, host_rows, is_first_process, on_every_process, on_first_process
from alignment_gap.training.loop import make_score
from alignment_gap.training.offline import DatasetConfig, on_devices

# Fields of a model's config that change how gradients are computed and how layers are compiled, not what they compute.
_OF_TRAINING = ("remat", "scan_unroll")


def reference_identity(dataset: Dataset, policy: Policy, params: Any, buckets: Sequence[Bucket]) -> dict[str, Any]:
    """What decides a dataset's log-probs: the dataset, the checkpoint, the lengths and the precision."""
    return {
        "dataset": dataset.card.digest,
        "checkpoint": params_digest(params),
        "model": {name: value for name, value in to_dict(policy.config).items() if name not in _OF_TRAINING},
        "lengths": [list(bucket) for bucket in buckets],
        "precision": {"compute": policy.config.dtype, "matmul": jax.config.values["jax_default_matmul_precision"]},
    }


def store_reference(
    dataset: Dataset,
    policy: Policy,
    params: Any,
    mesh: LogicalMesh,
    *,
    batch_size: int,
    buckets: Sequence[Bucket],
    progress: Callable[[int], None] = lambda examples: None,
) -> ReferenceLogProbs:
    """The dataset's log-probs under the policy: those that are stored, or else computed and stored now.

    What an earlier call with the same batch size had computed before it was killed is kept; all but its last minute.

    Args:
      dataset: what is scored.
      policy: the reference policy.
      params: its parameters, on the mesh.
      mesh: the device mesh.
      batch_size: examples that are scored at once, over all devices.
      buckets: the shapes (P, R) that batches are padded to, the last one of the longest lengths.
      progress: is told how many examples are newly done.

    Raises:
      UserError: what is stored is of another version of the dataset or was changed, or a token id is outside of the
        policy's vocabulary.
    """
    identity = reference_identity(dataset, policy, params, buckets)
    if stored := on_every_process(lambda: open_reference(dataset, identity)):
        return stored
    batches = offline_source(
        dataset,
        batch_size=batch_size,
        seed=0,
        prompt_length=buckets[-1][0],
        response_length=buckets[-1][1],
        buckets=buckets[:-1],
        host_rows=functools.partial(host_rows, mesh),
    )
    settings = DatasetConfig(str(dataset.folder), batch_size=batch_size)
    placed = on_devices(batches, settings, mesh, policy.config.vocabulary_size)
    with contextlib.ExitStack() as stack:
        folder = reference_folder(dataset, identity)
        on_first_process(lambda: stack.enter_context(locked(folder)))
        writer = on_every_process(
            lambda: ReferenceWriter(dataset, identity, batch_size) if is_first_process() else None
        )
        done = int(multihost_utils.broadcast_one_to_all(np.int32(writer.done if writer else 0)))
        progress(min(done * batch_size, len(dataset)))
        steps = range(done, -(-len(dataset) // batch_size))
        for step, log_probs in _scored(placed, make_score(policy, mesh), params, steps):
            if writer:
                writer.write(batches.numbers(step), log_probs)
            progress(min(batch_size, len(dataset) - step * batch_size))
        on_first_process(lambda: writer.close() if writer else None)
    stored = open_reference(dataset, identity)
    assert stored
    return stored


def _scored(
    batches: Callable[[int], PreferenceBatch], score: Callable[..., Array], params: Any, steps: range
) -> Iterator[tuple[int, np.ndarray]]:
    """Each step and the log-probs [B, K, R] of its whole batch."""
    with Prefetched(batches, 2, last=steps.stop) as ahead:
        for step in steps:
            batch = ahead(step)
            scored = score(params, batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
            if scored.is_fully_addressable:
                yield step, jax.device_get(scored)
            else:
                yield step, multihost_utils.process_allgather(scored, tiled=True)


def params_digest(params: Any) -> str:
    """SHA-256 in hexadecimal of every parameter's name, shape, dtype and bits, whatever mesh they are laid out on.

    The bits enter by two checksums of 32 bits each, sums of a hash of each element with its place; sums of integers
    do not depend on their order, so that no device needs the whole of a parameter.
    """
    checksums = jax.device_get(jax.jit(lambda tree: jax.tree.map(_checksum, tree))(params))
    content = [
        [jax.tree_util.keystr(name), list(leaf.shape), str(leaf.dtype), checksum.tolist()]
        for (name, leaf), checksum in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(checksums), strict=True
        )
    ]
    return hashlib.sha256(json.dumps(sorted(content)).encode()).hexdigest()


def _checksum(x: Array) -> UInt[Array, "2"]:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Multipliers of MurmurHash3's finaliser and of the golden ratio.
    sums = [_mix(_mix(place * jnp.uint32(0x9E3779B9) + jnp.uint32(seed)) ^ bits) for seed in (1, 2)]
    return jnp.stack([hashed.sum(dtype=jnp.uint32) for hashed in sums])


def _mix(x: UInt[Array, "*S"]) -> UInt[Array, "*S"]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
