"""Checkpoints of a run: complete or absent, with a record of their network; parameters can be read on their own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from alignment_gap import checks
from alignment_gap.checkpoints import Network, check_policy, check_shapes, find_checkpoint, known_network, run_like
from alignment_gap.checkpoints.adapters import base_of
from alignment_gap.checkpoints.digest import json_digest, params_digest
from alignment_gap.checkpoints.layout import DIGESTS, METADATA, NETWORK, PARAMS, first_line, open_store
from alignment_gap.checkpoints.network import to_json
from alignment_gap.checkpoints.tensors import shapes_of
from alignment_gap.errors import StorageError, UserError, is_disk_full, is_of_machine
from alignment_gap.folders import AnyPath, at, remove_folder
from alignment_gap.models import Policy, PreferenceModel, merged
from alignment_gap.models.quantized import INT8, is_quantized, quantize
from alignment_gap.models.reward_head import without_head
from alignment_gap.sharding import LogicalMesh, first_reason, first_says, on_every_process, on_first_process
from alignment_gap.storage import Url
from alignment_gap.training.bucket import BucketManager
from alignment_gap.training.guard import Skipped
from alignment_gap.training.state import TrainState, abstract_base, abstract_params, shardings_like

OPTIMIZER, INTERIM, DAMAGED = "optimizer", "interim", ".damaged"
# In a checkpoint's metadata: its guard's memory has the number of norms, which earlier versions did not count.
COUNTS_NORMS = "counts_norms"
# A kill may have left interim checkpoints among this many last ones.
_LEFT = 3
# Orbax counts the saves of all threads together, and reads the count again while a save begins.
_SAVING = threading.Lock()
# Metrics that can choose the best checkpoints, and a sign for each: signed, the highest value is the best.
_SIGNS = {"loss": -1.0, "accuracy": 1.0}
# If a save fails, each of Orbax's threads logs the error with a traceback, and so does each of its asyncio tasks that
# nobody awaits any more. Not shown: the save raises the error too.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and "orbax" in record.getMessage()))


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read, or whose values differ from the saved ones."""


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """Which checkpoints are kept. The last one always is; without any setting all are.

    Attributes:
      last: number of last checkpoints to keep.
      every: also keeps checkpoints at multiples of this number of steps.
      best: also keeps this many checkpoints with the best `metric`; if equal, the later ones.
      metric: metric of the validation: "loss" (lower is better) or "accuracy" (higher is better).
    """

    last: int | None = None
    every: int | None = None
    best: int | None = None
    metric: str = "loss"

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range, or two settings do not fit together."""
        checks.at_least(self, 1, "last", "every", "best")
        checks.one_of(self, _SIGNS, "metric")
        for name in ("every", "best"):
            if getattr(self, name) is not None and self.last is None:
                raise UserError(f"keep.{name} is {getattr(self, name)}, but keep.last is not set: set it to 1 or more")

    def policy(self) -> Any:
        """Orbax's preservation policy for these settings."""
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(self.last)]
        policies += [ocp.checkpoint_managers.EveryNSteps(self.every)] if self.every else []
        if self.best:
            # A checkpoint without metrics was saved before `best` was set.
            policies.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=self.goodness, n=self.best, keep_checkpoints_without_metrics=False
                )
            )
        return ocp.checkpoint_managers.AnyPreservationPolicy(policies)

    def goodness(self, metrics: Mapping[str, float]) -> float:
        """A score, higher is better; minus infinity if the metric is missing or not finite."""
        value = _SIGNS[self.metric] * metrics.get(self.metric, math.nan)
        return value if math.isfinite(value) else -math.inf


@dataclasses.dataclass
class _OfThoseDue:
    """Applies a policy to the checkpoints that were due. `Checkpoints` itself removes interim checkpoints."""

    policy: Any
    interim: Callable[[], Collection[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each of the checkpoints."""
        interim = self.interim()
        due = [each for each in checkpoints if each.step not in interim]
        kept = iter(self.policy.should_preserve(due, context=context))
        return [each.step in interim or next(kept) for each in checkpoints]


class Checkpoints:
    """The checkpoints in a folder, one for each step, written by Orbax; use as a context manager.

    A checkpoint appears under its name only when all of it is on disk, so an incomplete one is never restored. It holds
    a digest of each of its parts; a restore compares them. In a bucket, `BucketManager` writes the checkpoints.

    Args:
      folder: folder of the checkpoints; the first save makes it.
      network: the network to record in new checkpoints; not needed for reading.
      keep: which checkpoints are kept.
    """

    def __init__(self, folder: AnyPath, network: Network | None = None, keep: KeepConfig = KeepConfig()) -> None:
        self.folder = folder
        self._metadata = {NETWORK: to_json(network)} if network else {}
        self._own_digest = {NETWORK: json_digest(self._metadata.get(NETWORK))}
        # Steps of interim checkpoints to remove; None before the first save.
        self._interim: set[int] | None = None
        self._manager: Any = _open_manager(folder, keep, lambda: self._interim or ())

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, interim: bool = False, metrics: Mapping[str, float] | None = None) -> None:
        """Saves the state under its step. It returns when the state is copied to the host; writing then continues.

        An interim checkpoint is for a run that ends before its next checkpoint is due; the next save removes it.

        Args:
          state: state of the run.
          interim: whether the checkpoint is interim, because none is due.
          metrics: validation metrics of this state, for `keep.best`; None if it was not validated.

        Raises:
          UserError: the disk is full, now or when the previous checkpoint was written.
        """
        self._finish()
        with self._told_when_full():
            self.folder.mkdir(parents=True, exist_ok=True)
        if self._interim is None:
            self._interim = {*first_says(self._find_interim).tolist()} - {-1}
        step, items = int(jax.device_get(state.step)), _items(state)
        digests = self._own_digest | {name: params_digest(tree) for name, tree in items.items()}
        self._interim |= {step} if interim else set()
        marks = ({INTERIM: True} if interim else {}) | ({} if state.skipped.norms is None else {COUNTS_NORMS: True})
        with _SAVING, self._told_when_full():
            self._manager.save(
                step,
                args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()}),
                metrics=dict(metrics or {}),
                custom_metadata=self._metadata | {DIGESTS: digests} | marks,
            )

    @contextlib.contextmanager
    def _told_when_full(self) -> Iterator[None]:
        """Turns the error of a full disk into one line. Earlier checkpoints stay."""
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            last = f"step {self.steps()[-1]}" if self.steps() else "the start"
            raise UserError(
                f"no space is left for a checkpoint in {self.folder}: free some and run the same command again, which "
                f"goes on from {last}"
            ) from error

    def _find_interim(self) -> np.ndarray:
        """The steps of interim checkpoints that an earlier process left, padded with -1 to a fixed size."""
        last = self.steps()[-_LEFT:]
        found = [step for step in last if (self._said(step) or {}).get(INTERIM)]
        return np.array((found + [-1] * _LEFT)[:_LEFT])

    def _finish(self) -> None:
        """Waits until the last save is on disk, then removes the interim checkpoints before it."""
        with self._told_when_full():
            self._manager.wait_until_finished()
        if self._interim:
            there = self.steps()
            for step in self._interim.intersection(there[:-1]):
                self._manager.delete(step)
            self._interim.intersection_update(there[-1:])

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The whole state of a step, sharded like `abstract`.

        Raises:
          DamagedCheckpoint: the checkpoint cannot be read, or differs from what was saved.
          UserError: the checkpoint was imported, or is from an earlier version of this library.
        """
        said = self._said(step)
        if said is not None and OPTIMIZER not in said.get(DIGESTS, {}):
            raise UserError(
                f"{self.folder}/{step} was imported, or saved by an earlier version, and has no whole state of a run: "
                "give another folder, and this one as its start"
            )
        counts = said is None or COUNTS_NORMS in said
        wanted = abstract if counts else dataclasses.replace(abstract, skipped=_uncounted(abstract.skipped))
        restored = self._restore(step, _items(wanted))
        rest, copies = restored.optimizer, restored.copies if abstract.copies else {}
        skipped: Skipped = rest["skipped"]
        if not counts:
            skipped = dataclasses.replace(skipped, norms=rest["step"] - skipped.total)
        return TrainState(rest["step"], restored.params, rest["optimizer_state"], copies, skipped)

    def restore_last(self, abstract: TrainState, say: Callable[[str], None]) -> TrainState | None:
        """Restores the newest undamaged checkpoint, and renames the damaged ones after it.

        Args:
          abstract: the state's shapes and shardings.
          say: prints a line for each damaged checkpoint.

        Returns:
          The state, or None if the folder has no checkpoint.

        Raises:
          UserError: all checkpoints are damaged, or the last one is of another model, or from an earlier version of
            this library.
        """
        while (last := self._agreed_last()) is not None:
            try:
                return self.restore(abstract, last)
            except DamagedCheckpoint as error:
                folder = self.folder / str(last)
                on_first_process(functools.partial(_put_aside, folder))
                self._manager.reload()
                told = f"{error}; it is put aside as {_aside(folder).name}, and"
                if not self.steps():
                    # The cause may be something else than damage, and the start may be days ago.
                    raise UserError(f"{told} no other is left: run the command again to begin anew") from error
                say(f"{told} training goes on from step {self.steps()[-1]}")
        return None

    def _agreed_last(self) -> int | None:
        """The last step that the first process sees; None if it sees none. All processes restore the same step.

        Raises:
          StorageError: another process does not see it, as for a while on a network's file system.
        """
        last = int(first_says(lambda: max(self.steps(), default=-1)))

        def check() -> None:
            if last != -1 and last not in self.steps():
                raise StorageError(
                    f"process 0 sees the checkpoint {self.folder}/{last}, but another process does not: run the same "
                    "command again",
                    status=1,
                )

        on_every_process(check)
        return None if last == -1 else last

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """The parameters of a step, or of the last step.

        Raises:
          UserError: there is no checkpoint, it is damaged, or it is of another model; the message names the tensors
            that differ, with both shapes.
        """
        if step is None:
            if not self.steps():
                raise UserError(f"{self.folder} holds no complete checkpoint: train it first, or give another folder")
            step = self.steps()[-1]
        return self._restore(step, {"params": abstract_params}).params

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        """The parts of a checkpoint, checked against their digests; if one process raises, all raise."""
        on_every_process(lambda: _check_shapes(self.folder / str(step) / PARAMS, items["params"]))
        targets = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in items.items()})
        try:
            restored, reason = self._manager.restore(step, args=targets), ""
        except (jax.errors.JaxRuntimeError, StorageError):
            raise  # An error of the device, such as no memory left, or of the connection to a bucket.
        except Exception as error:  # For a damaged file, Orbax may raise anything, even a bare Exception.
            if is_of_machine(error):
                raise
            restored, reason = None, first_line(error) or type(error).__name__
        # Digests are computed by all processes or by none.
        reason = first_reason(reason)
        reason = reason or first_reason(self._difference(step, {name: restored[name] for name in items}))
        if reason:
            raise DamagedCheckpoint(
                f"{self.folder}/{step} cannot be restored ({reason}): it is damaged or of another model"
            )
        return restored

    def _difference(self, step: int, items: dict[str, Any]) -> str:
        """The parts in which a checkpoint differs from what was saved; "" if none does, or it has no digests."""
        said = self._said(step)
        if said is None:
            return f"{METADATA} cannot be read"
        wanted = said.get(DIGESTS, {})
        found = {name: params_digest(tree) for name, tree in items.items()}
        found |= {NETWORK: json_digest(said.get(NETWORK))}
        changed = [name for name, digest in found.items() if wanted.get(name, digest) != digest]
        return f"{' and '.join(changed)} are not what was saved" if changed else ""

    def _said(self, step: int) -> dict[str, Any] | None:
        """The custom metadata of a step's checkpoint; None if they cannot be read."""
        try:
            return json.loads((self.folder / str(step) / METADATA).read_text())["custom_metadata"] or {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if is_of_machine(error):
                raise
            return None


def _open_manager(folder: AnyPath, keep: KeepConfig, interim: Callable[[], Collection[int]]) -> Any:
    preserved = _OfThoseDue(keep.policy(), interim)
    if isinstance(folder, Url):
        return BucketManager(folder, preserved)
    options = ocp.CheckpointManagerOptions(
        create=False,
        # With this function, Orbax stores the metrics in the checkpoint.
        best_fn=keep.goodness if keep.best else None,
        preservation_policy=preserved,
    )
    try:
        return ocp.CheckpointManager(folder.absolute(), options=options)
    except ValueError as error:
        raise DamagedCheckpoint(
            f"{folder} cannot be opened ({first_line(error)}): {METADATA} or metrics of one of its steps are damaged, "
            "move that step away"
        ) from error


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a checkpoint, each readable on its own."""
    rest = {"step": state.step, "optimizer_state": state.optimizer_state, "skipped": state.skipped}
    return {PARAMS: state.params, OPTIMIZER: rest} | ({"copies": state.copies} if state.copies else {})


def _uncounted(skipped: Skipped) -> Skipped:
    """The guard's memory in the form of an earlier version."""
    return dataclasses.replace(skipped, norms=None)


def _aside(folder: AnyPath) -> AnyPath:
    """The new name of a damaged checkpoint; in a bucket, the new name of its metadata, which hides the checkpoint."""
    return folder / (METADATA + DAMAGED) if isinstance(folder, Url) else folder.with_name(folder.name + DAMAGED)


def _put_aside(folder: AnyPath) -> None:
    aside = _aside(folder)
    if isinstance(folder, Url):
        aside.write_bytes((folder / METADATA).read_bytes())
        (folder / METADATA).unlink()
    else:
        remove_folder(aside)
        os.replace(folder, aside)


# What tells a base in memory: its digest, the dtype of the computation, and the dtype of its projections if another.
BaseKey = tuple[str | None, str, str | None]
# Functions that return the parameters of a base already in memory.
Bases = Mapping[BaseKey, Callable[[], Any]]


def base_key(network: Network) -> BaseKey:
    """What tells the base of a network's adapters in memory."""
    return network.base_digest, network.model.dtype, network.adapter.base_dtype if network.adapter else None


def load_policy(path: str | AnyPath, mesh: LogicalMesh, step: int | None = None) -> tuple[Policy, Any]:
    """The policy of a checkpoint, and its parameters, sharded over the mesh; adapters come with their base.

    Args:
      path: a run's folder, its checkpoints/, or the folder of a step.
      mesh: the device mesh.
      step: step of the checkpoint; None for the last.

    Raises:
      UserError: there is no checkpoint, it is damaged, it does not record its network, or it is no policy.
    """
    folder = find_checkpoint(at(path), step)
    network = known_network(folder)
    check_policy(network, str(path))
    return network.policy(), load_params(folder, network, mesh)


def load_preference_model(
    path: str | AnyPath, mesh: LogicalMesh, step: int | None = None, bases: Bases = MappingProxyType({})
) -> tuple[PreferenceModel, Any]:
    """The preference model of a checkpoint, and its parameters; see `load_policy` and `load_params`."""
    folder = find_checkpoint(at(path), step)
    network = known_network(folder)
    return network.preference_model(), load_params(folder, network, mesh, bases)


def load_params(folder: AnyPath, network: Network, mesh: LogicalMesh, bases: Bases = MappingProxyType({})) -> Any:
    """The parameters of a step's checkpoint, sharded over the mesh.

    For a checkpoint of adapters, the result is the base with the adapters in place. If the base is in `bases`, it is
    shared; else it is loaded, and kept as `AdapterConfig.base_dtype` says.

    Raises:
      UserError: the checkpoint is damaged or of another network, or the adapters' base has changed.
    """
    params = _restored(folder, network, mesh)
    if network.adapters is None:
        return params
    known = bases.get(base_key(network))
    if known is None:
        base, base_dtype = base_of(folder, network), network.adapters.config.base_dtype
        source = known_network(base)
        source = dataclasses.replace(source, model=run_like(source.model, network.model))
        known = functools.partial(load_base, base, source, mesh, base_dtype)
    return network.adapters.on(known(), params)


def load_base(folder: AnyPath, network: Network, mesh: LogicalMesh, base_dtype: str | None = None) -> Any:
    """The parameters of a checkpoint as the base of adapters, held as `AdapterConfig.base_dtype` says."""
    params = load_plain(folder, network, mesh)
    held, tree = jax.tree.flatten(params if network.head is None else without_head(params))
    abstract = abstract_base(network.policy(), mesh, base_dtype)
    # One array at a time, so that there is no second copy of all parameters.
    for place, like in enumerate(jax.tree.leaves(abstract, is_leaf=is_quantized)):
        if is_quantized(like):
            inputs = like.values.ndim - like.scale.ndim
            held[place] = jax.jit(quantize, static_argnums=1, out_shardings=shardings_like(like))(held[place], inputs)
        else:
            held[place] = held[place].astype(like.dtype)
    return jax.tree.unflatten(tree, held)


def load_plain(folder: AnyPath, network: Network, mesh: LogicalMesh) -> Any:
    """The float32 parameters of a checkpoint with plain kernels: adapters are added to the kernels of their base.

    Kernels that the adapters' run held in int8 have the values of int8.
    """
    params = _restored(folder, network, mesh)
    if network.adapters is None:
        return params
    place = base_of(folder, network)
    base = load_plain(place, known_network(place), mesh)
    shardings = shardings_like(abstract_params(network.whole_init, mesh))
    if network.adapters.config.base_dtype == INT8:
        base = jax.jit(network.adapters.rounded, out_shardings=shardings_like(base))(base)
    return jax.jit(merged, out_shardings=shardings)(network.adapters.on(base, params))


def _restored(folder: AnyPath, network: Network, mesh: LogicalMesh) -> Any:
    """The parameters that a checkpoint holds: all, or adapters alone."""
    with Checkpoints(folder.parent) as checkpoints:
        return checkpoints.restore_params(abstract_params(network.init, mesh), int(folder.name))


def _check_shapes(path: AnyPath, params: Any) -> None:
    """Raises UserError that names the parameters that are missing in the checkpoint, or have another shape."""
    try:
        if isinstance(path, Url):
            found = {name: tensor.shape for name, tensor in open_store(path).items()}
        else:
            found = shapes_of(ocp.StandardCheckpointHandler().metadata(epath.Path(path.absolute())).tree)
    except StorageError:
        raise
    except Exception:  # The checkpoint is damaged, and the restore reports how. Orbax may raise anything.
        return
    check_shapes(str(path), found, shapes_of(params))
