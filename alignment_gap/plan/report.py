"""A plan as tables for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax

from alignment_gap.models import abstract_parameters, count_parameters
from alignment_gap.plan.best import Search
from alignment_gap.plan.graph import JobPlan, longest_chain, side_by_side
from alignment_gap.plan.plan import Plan
from alignment_gap.plan.roofline import milliseconds
from alignment_gap.sharding import AXES, undivided
from alignment_gap.sharding.chips import GIB
from alignment_gap.tables import text_table

_BOUNDS = {"compute": "arithmetic", "hbm": "HBM", "interconnect": "interconnect"}
# Numbers of slices that a whole graph is planned for.
_SLICES = (2, 4, 8, 16)


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan, in bytes, FLOPs and seconds; an unknown time is None."""
    values = dataclasses.asdict(plan)
    del values["config"]["programs"]  # They are among the parts.
    for part, each in zip(plan.parts, values["parts"], strict=True):
        each["compiled"]["peak"], each["tokens"] = part.compiled.peak, part.tokens
        if part.times:
            each["times"] |= {"seconds": part.times.seconds, "bound": part.times.bound}
    return values | {
        "devices": plan.config.topology.devices,
        "parameters": parameters(plan),
        "fits": plan.fits,
        "needed": plan.needed,
        "step_seconds": _finite(plan.step_seconds),
        "job_seconds": _finite(plan.job_seconds),
        "utilisation": plan.utilisation if math.isfinite(plan.step_seconds) else None,
    }


def parameters(plan: Plan) -> int:
    """The number of parameters of the first program's network."""
    return count_parameters(plan.config.programs[0].facts.network.policy())


def _finite(seconds: float | None) -> float | None:
    """The time; None if it is not known, or infinite because a program does not fit."""
    return seconds if seconds is not None and math.isfinite(seconds) else None


def _trained(plan: Plan) -> str:
    adapters = plan.config.programs[0].facts.network.adapters
    if adapters is None:
        return ""
    return f" and {sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(adapters.init))):,} of adapters"


def as_text(plan: Plan) -> str:
    """The plan for the terminal."""
    config, topology = plan.config, plan.config.topology
    data, fsdp, model = config.job.mesh.shape(topology.devices)
    shape = config.programs[0].batch
    policy = abstract_parameters(config.programs[0].facts.network.policy().init)
    whole = undivided(policy, {"data": data, "fsdp": fsdp, "model": model}, config.job.mesh.all_rules())
    head = [
        f"{parameters(plan):,} parameters{_trained(plan)} on {topology.devices} devices ({topology.name}"
        + (f", {topology.slices} slices" if topology.slices > 1 else "")
        + f"), mesh data={data} fsdp={fsdp} model={model}",
        f"batch {shape.batch} prompts of {shape.prompt} tokens, {shape.samples} responses of {shape.response}",
        *filter(None, [whole]),
        "",
    ]
    return "\n".join(
        [*head, *_memory_lines(plan), "", *_time_lines(plan), "", *_collective_lines(plan), *_verdict(plan)]
    )


def graph_json(planned: Sequence[JobPlan]) -> dict[str, Any]:
    """The jobs of a graph with their seconds at best, and the plans that they share, in seconds and bytes.

    `plan` of a job is the place of its plan in `plans`; None if it computes on no device. A time is None if a program
    does not fit.
    """
    groups = _alike(planned)
    places = {id(each): place for place, group in enumerate(groups) for each in group}
    jobs = [
        {
            "job": each.job.name,
            "folder": str(each.job.folder),
            "seconds": _finite(each.seconds),
            "device_seconds": _finite(each.device_seconds),
            "plan": places.get(id(each)),
        }
        for each in planned
    ]
    return {
        "device_seconds": _finite(_device_seconds(planned)),
        "longest_chain_seconds": _finite(longest_chain(planned)),
        "side_by_side_seconds": {str(slices): _finite(side_by_side(planned, slices)) for slices in _SLICES},
        "jobs": jobs,
        "plans": [as_json(group[0].plan) for group in groups if group[0].plan],
    }


def graph_text(planned: Sequence[JobPlan]) -> str:
    """The jobs of a graph that compute on devices, those that cost most first; jobs with equal plans share a line."""
    total, groups = _device_seconds(planned), sorted(_alike(planned), key=_device_seconds, reverse=True)
    headers = ["jobs", "hours each", "device-hours", "share", "most of it", "GiB a device", ""]
    devices = max((each.plan.config.topology.devices for each in planned if each.plan), default=1)
    count = sum(map(len, groups))
    lines = [
        text_table(headers, [_group_cells(group, total) for group in groups]),
        f"{count} jobs on {devices} devices: {_hours(total)} device-hours, {_hours(total / devices)} hours one after "
        "another, at best",
        f"the longest chain of jobs that need each other takes {_hours(longest_chain(planned))} hours",
        *_side_by_side_lines(planned),
        *_share_lines(planned),
    ]
    return "\n".join(lines)


def _side_by_side_lines(planned: Sequence[JobPlan]) -> list[str]:
    """The time on several slices alike; nothing if no job computes on devices."""
    names = [each.plan.config.topology.name for each in planned if each.plan]
    slices, hours = zip(*((str(n), _hours(side_by_side(planned, n))) for n in _SLICES), strict=True)
    return [f"side by side on {', '.join(slices)} times {names[0]}: {', '.join(hours)} hours"] if names else []


def _share_lines(planned: Sequence[JobPlan]) -> list[str]:
    """How the time of all jobs splits by program and by bound, and its MFU; nothing if a job does not fit."""
    total, plans = _device_seconds(planned), [each.plan for each in planned if each.plan]
    if not total or not math.isfinite(total):
        return []
    shares = {"by program": defaultdict[str, float](float), "bound by": defaultdict[str, float](float)}
    done = 0.0
    for part in (part for plan in plans for part in plan.parts):
        calls = part.program.calls
        if not calls or part.times is None:
            continue
        # The first word of "reference, fresh" and of "judge golden".
        shares["by program"][part.program.name.replace(",", "").split()[0]] += calls * part.times.seconds
        shares["bound by"][_BOUNDS[part.times.bound]] += calls * part.times.seconds
        done += calls * part.compiled.model_flops
    largest_first = {what: sorted(found, key=found.__getitem__, reverse=True) for what, found in shares.items()}
    lines = [
        f"{what}: " + ", ".join(f"{name} {shares[what][name] / sum(shares[what].values()):.0%}" for name in names)
        for what, names in largest_first.items()
    ]
    return [*lines, f"MFU {done / (total * plans[0].config.topology.chip.flops):.0%}, at best"]


def _alike(planned: Sequence[JobPlan]) -> list[list[JobPlan]]:
    """The jobs that compute on devices; those of one kind with the same calls of the same programs are together."""
    groups: dict[Any, list[JobPlan]] = {}
    for each in planned:
        if each.plan is not None:
            parts = tuple((part.program.name, part.program.calls, part.compiled) for part in each.plan.parts)
            groups.setdefault((each.job.kind.name, parts), []).append(each)
    return [*groups.values()]


def _device_seconds(planned: Sequence[JobPlan]) -> float:
    return sum(each.device_seconds for each in planned)


def _group_cells(group: Sequence[JobPlan], total: float) -> list[str]:
    plan, more = group[0].plan, len(group) - 1
    assert plan is not None
    timed = [(part.times.seconds * (part.program.calls or 0), part) for part in plan.parts if part.times]
    seconds, longest = max(timed, key=lambda each: each[0], default=(0.0, None))
    share = seconds / group[0].seconds if group[0].seconds else 0.0
    bound = f"{longest.program.name} {share:.0%}, {_BOUNDS[longest.times.bound]}" if longest and longest.times else ""
    return [
        group[0].job.name + (f" and {more} more" if more else ""),
        _hours(group[0].seconds),
        _hours(_device_seconds(group)),
        f"{_device_seconds(group) / total:.1%}" if total and math.isfinite(total) else "",
        bound,
        _gib(plan.needed),
        "" if plan.fits else "does not fit",
    ]


def gin_text(search: Search, command: str, model: str | None) -> str:
    """The settings of the best trial as a gin file, which goes after the job's own on the command line.

    Args:
      search: a search that found one.
      command: the command that made it.
      model: the policy's size by name, whose gin file is included; None writes all fields of the policy's config,
        because only a model that a gin file sets takes settings such as remat.
    """
    assert search.best is not None
    plan, choice = search.best.plan, search.best.choice
    config, shape, policy = plan.config, plan.config.programs[0].batch, plan.config.programs[0].model
    data, fsdp, of_model = choice.sizes
    names = ("remat", "dtype") if model else [field.name for field in dataclasses.fields(policy) if field.init]
    fields = {name: getattr(policy, name) for name in names}
    lines = [
        f"# The fastest of {len(search.trials)} settings for {config.topology.name}, by {search.compiled} compiled "
        "programs:",
        f"#   {command}",
        f"# A step of {shape.batch} prompts of {shape.prompt} tokens with {shape.samples} responses of "
        f"{shape.response} takes at best {milliseconds(plan.step_seconds)} ms,",
        f"# MFU {plan.utilisation:.0%}, and {_gib(plan.needed)} of {_gib(plan.capacity)} GiB a device.",
        *([f'include "models/{model}.gin"'] if model else []),
        "",
        "MeshConfig:",
        f'  layout = "{choice.layout}"',
        *(f"  {axis} = {size}" for axis, size in zip(AXES, (data, fsdp, of_model), strict=True)),
        *([f"  slices = {config.job.mesh.slices}"] if config.job.mesh.slices > 1 else []),
        "",
        f"{type(policy).__name__}:",
        *(f"  {name} = {value!r}" for name, value in fields.items()),
        *([] if model else [f"MODEL = @{type(policy).__name__}()"]),
        "",
        f"BATCH_SIZE = {shape.batch}",
        f"MICROBATCHES = {choice.microbatches}",
        f'OptimizerConfig.moment_dtype = "{choice.moment_dtype}"',
        *([f"STEPS_PER_DRAW = {choice.steps_per_draw}"] if choice.steps_per_draw > 1 else []),
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(plan: Plan) -> list[str]:
    rows = [["HBM of a device, GiB", "arguments", "outputs", "aliased", "temporaries", "code", "peak"]]
    for part in plan.parts:
        c = part.compiled
        sizes = [c.arguments, c.outputs, c.aliased, c.temporaries, c.code]
        cells = ["-"] * 5 if c.exceeded else [_gib(size) for size in sizes]
        rows.append([part.program.name, *cells, _gib(c.peak)])
    lines = [text_table(rows[0], rows[1:])]
    lines.append(
        "resident from step to step: " + ", ".join(f"{name} {_gib(size)}" for name, size in plan.resident.items())
    )
    lines.append(
        f"and {_gib(plan.working)} that a program of the step works in; "
        f"in all {_gib(plan.needed)} of {_gib(plan.capacity)} GiB"
    )
    return lines


def _time_lines(plan: Plan) -> list[str]:
    rows = [["at best, ms", "arithmetic", "HBM", "interconnect", "takes", "bound by", "model TFLOP", "recomputed"]]
    tokens = []
    for part in plan.parts:
        compiled, t = part.compiled, part.times
        cells = ["-"] * 5
        if t:
            cells = [*map(milliseconds, (t.compute, t.hbm, t.interconnect, t.seconds)), _BOUNDS[t.bound]]
        counts = (compiled.model_flops, compiled.flops - compiled.model_flops)
        name = part.program.name + (f", for {part.program.steps} steps" if part.program.steps > 1 else "")
        rows.append([name, *cells, *(f"{count / 1e12:,.3g}" for count in counts)])
        if part.tokens and t:
            tokens.append(
                f"{part.program.name}: {milliseconds(t.seconds / part.tokens)} ms a token, with its part of the "
                f"prompts; reading parameters and cache once takes {milliseconds(part.token_seconds)} ms"
            )
    lines = [text_table(rows[0], rows[1:]), *tokens]
    if math.isfinite(plan.step_seconds):
        rate = plan.config.programs[0].batch.batch / plan.step_seconds
        lines.append(f"a step {plan.step_seconds:.3g} s, {rate:,.0f} prompts/s, MFU {plan.utilisation:.0%}, at best")
        if plan.job_seconds is not None:
            hours, all_hours = (_hours(n * plan.job_seconds) for n in (1, plan.config.topology.devices))
            lines.append(f"the whole job {hours} hours, {all_hours} device-hours, at best")
    return lines


def _collective_lines(plan: Plan) -> list[str]:
    rows = [["collectives of a call", "kind", "mesh axes", "devices", "count", "GiB", "ms"]]
    for part in plan.parts:
        for moved in part.compiled.collectives[:4]:
            sizes = [str(moved.devices), f"{moved.count:,}", f"{moved.bytes / GIB:.2f}", milliseconds(moved.seconds)]
            rows.append([part.program.name, moved.kind, moved.axes, *sizes])
    return [text_table(rows[0], rows[1:]), ""] if len(rows) > 1 else []


def _verdict(plan: Plan) -> list[str]:
    lines = []
    if plan.largest_batch is not None:
        lines.append(f"largest batch that fits: {plan.largest_batch or 'none'}")
    if plan.fits:
        return [*lines, f"fits: {_gib(plan.capacity - plan.needed)} GiB a device are free"]
    lines.append(f"does not fit: {_gib(plan.needed - plan.capacity)} GiB a device too many; what would help:")
    return lines + [f"  {each}" for each in plan.advice]


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
