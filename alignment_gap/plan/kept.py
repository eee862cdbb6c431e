"""Compiles every program of a plan once, and keeps the compiler's figures in a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import alignment_gap
from alignment_gap.configuration import flatten, to_dict
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, read_json, write_json
from alignment_gap.jobs.assembly import Facts
from alignment_gap.plan.plan import Compile
from alignment_gap.plan.programs import Compiled, compile_program
from alignment_gap.plan.roofline import Moved
from alignment_gap.plan.steps import SAMPLES, PlanConfig, Program

# Settings that change no program but for numbers in it: folders, seeds, rates, when something is saved or logged, and
# where the arrays of a batch come from.
_WITHOUT_COST = {
    *("folder", "weights", "order", "window", "epochs", "vocabulary", "prefetch", "record", "judge", "step"),
    *("seed", "steps", "checkpoint_every", "checkpoint_steps", "log_every", "start_step", "reference_step"),
    *("learning_rate", "warmup_steps", "beta", "reference_log_probs", "steps_per_draw"),
}
# Groups of such settings. The network is among the facts of a program.
_GROUPS_WITHOUT_COST = ("keep.", "monitor.", "model.")
# Distributions whose version may change what a program costs.
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda13-plugin")
# The settings that programs other than updates depend on, and those that samplers depend on too. Either source of a job
# may be online.
_PLACED = ("mesh.", "adapter.")
_SAMPLED = tuple(
    f"{source}.{name}" for source in ("source", "fresh") for name in ("samples", "mixture", "against", "sampler.")
)


def kept(folder: AnyPath | None, say: Callable[[str], None], compile_: Compile = compile_program) -> Compile:
    """Compiles every program once, and keeps the figures in a folder, from which a stopped plan continues.

    A program is compiled again if a source file of this package, or the version of jax or of a compiler, has changed.

    Args:
      folder: the folder; None to keep the figures in memory only.
      say: gets a line about each program before it is compiled.
      compile_: compiles one program.

    Raises:
      UserError: the folder cannot be made; raised before anything is compiled.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write in {folder} ({error.strerror}): give a folder that can be written"
            ) from error
    found: dict[str, Compiled] = {}
    sources = _sources_digest() if folder is not None else ""

    def compile_once(config: PlanConfig, program: Program) -> Compiled:
        key = hashlib.sha256((program_key(config, program) + sources).encode()).hexdigest()[:16]
        path = folder / f"{key}.json" if folder is not None else None
        if key not in found and path is not None and path.exists():
            values = read_json(path, remedy="remove it")
            moved = tuple(Moved(**each) for each in values.pop("collectives"))
            found[key] = Compiled(**values, collectives=moved)
        if key not in found:
            devices, of = config.topology.devices, f"batch {program.batch.batch}, width {program.model.width}"
            say(f"compiling {program.name} for {devices} devices of {config.topology.name}, {of}")
            found[key] = compile_(config, program)
            if path is not None:
                write_json(path, dataclasses.asdict(found[key]))
        return found[key]

    return compile_once


def program_key(config: PlanConfig, program: Program) -> str:
    """A text that is equal for programs that cost the same: they differ at most in numbers such as a learning rate."""
    facts, is_update = program.facts, program.kind == "update"
    network = dataclasses.replace(facts.network, base=None)
    facts = dataclasses.replace(facts, network=network) if is_update else Facts(network, facts.batch)
    settings = {name: value for name, value in flatten(to_dict(config.job)).items() if _has_cost(name, program.kind)}
    # What a start or a reference is does not matter, but whether there is one.
    settings |= {name: getattr(config.job, name) is not None for name in ("start", "reference")} if is_update else {}
    topology = config.topology
    alike = dataclasses.replace(program, name="", facts=facts, holds=False, calls=None)
    return json.dumps([settings, topology.name, topology.slices, repr(alike)], sort_keys=True, default=repr)


def _has_cost(setting: str, kind: str) -> bool:
    """Whether a program of this kind may take longer with another value of the setting of a training job."""
    if kind != "update":
        return setting.startswith(_PLACED + _SAMPLED * (kind in SAMPLES))
    return setting.rpartition(".")[2] not in _WITHOUT_COST and not setting.startswith(_GROUPS_WITHOUT_COST)


def _sources_digest() -> str:
    """A digest of this package's source files, and of the versions of what compiles them."""
    root, digest = Path(alignment_gap.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    installed = importlib.metadata.distributions()
    versions = {f"{each.name} {each.version}" for each in installed if each.name in _COMPILERS}
    return digest.hexdigest() + repr(sorted(versions))
