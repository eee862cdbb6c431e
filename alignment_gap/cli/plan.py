"""Tell whether a job fits a slice, and how long its steps take at best, without a TPU.

alignment-gap plan --model=t5_xxl --topology=v5e:16x16 --layout=fsdp --batch=512 --json=plan.json
alignment-gap plan --model=t5_xl --online --golden=t5_xxl --proxy=t5_large --topology=v5p:4x4x4 --batch=64

The update step, the sampler and the preference models' scoring are those that a run calls, lowered and compiled by the
TPU's own compiler (pip install alignment-gap[tpu]). Exit status 1 where the job does not fit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from alignment_gap.cli.parsing import parse_flags
from alignment_gap.errors import UserError

if TYPE_CHECKING:
    from alignment_gap.plan.plan import PlanConfig


def main(arguments: list[str]) -> None:
    """Makes and shows the plan; raises UserError for flags that cannot be used, SystemExit(1) where it does not fit."""
    values = make_flags()
    if "--help" in arguments or "-h" in arguments:
        print(__doc__, values.get_help(), sep="\n")
        return
    parse_flags(values, arguments)
    # This process only counts; those that compile have devices of their own, and a TPU library looks for none here.
    os.environ["JAX_PLATFORMS"] = "cpu"
    config = read_config(values)

    from alignment_gap.plan.plan import make_plan
    from alignment_gap.plan.report import as_json, as_text, check_picture, write_picture

    if values.picture:
        check_picture(Path(values.picture))
    plan = make_plan(config, say=lambda line: print(line, file=sys.stderr))
    print(as_text(plan))
    if values.json:
        Path(values.json).parent.mkdir(parents=True, exist_ok=True)
        Path(values.json).write_text(json.dumps(as_json(plan), indent=1) + "\n")
    if values.picture:
        write_picture(plan, Path(values.picture))
    if not plan.fits:
        sys.exit(1)


def make_flags() -> flags.FlagValues:
    """The command's flags."""
    values = flags.FlagValues()

    def text(name: str, default: str, says: str) -> None:
        flags.DEFINE_string(name, default, says, flag_values=values)

    def number(name: str, default: int, says: str, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, says, lower_bound=least, flag_values=values)

    text("model", "", "Size of the policy by name, such as t5_xxl or palm_8b.")
    text("topology", "", "Devices: v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, cpu:8 or cuda:8.")
    number("slices", 1, "Slices of that topology, joined by the data-centre network.")
    text("layout", "fsdp", "How networks and batches are laid out: data, fsdp, tensor, fsdp_tensor or sequence.")
    number("data_axis", 0, "Size of the mesh axis data; 0 for the layout's own.", least=-1)
    number("fsdp_axis", 0, "Size of the mesh axis fsdp; 0 for the layout's own.", least=-1)
    number("model_axis", 0, "Size of the mesh axis model; 0 for the layout's own.", least=-1)
    number("batch", 512, "Prompts of a step, over all devices.")
    number("microbatches", 1, "Parts of a batch whose gradients are added up.")
    number("prompt_length", 1024, "Tokens of a prompt.")
    number("response_length", 128, "Tokens of a response.")
    number("samples", 2, "Responses of a prompt.", least=2)
    text("loss", "ipo", "A loss by name.")
    text("optimizer", "adamw", "adamw, adafactor or sgd.")
    text("remat", "full", "What the backward pass computes again: none, dots or full.")
    text("dtype", "bfloat16", "Of the computation; parameters are float32.")
    flags.DEFINE_boolean(
        "online", False, "Plan the online step: sampling, reference and labels too.", flag_values=values
    )
    text("golden", "t5_xxl", "Size of the golden preference model, with --online; empty for none.")
    text("proxy", "t5_large", "Size of the proxy preference model, with --online.")
    flags.DEFINE_boolean("evaluate", True, "Offline: plan sampling and labels beside the step.", flag_values=values)
    flags.DEFINE_boolean("search", True, "Look for the largest batch that fits.", flag_values=values)
    text("json", "", "File for everything that is found.")
    text("picture", "", "File for a picture, .png or .svg.")
    return values


def read_config(values: flags.FlagValues) -> PlanConfig:
    """The plan that flags ask for; raises UserError for what they cannot mean, before anything is compiled."""
    from alignment_gap import losses
    from alignment_gap.models import make_policy
    from alignment_gap.plan.chips import parse_topology
    from alignment_gap.plan.flops import Lengths
    from alignment_gap.plan.plan import PlanConfig
    from alignment_gap.training import OptimizerConfig

    for name in ("model", "topology"):
        if not values[name].value:
            raise UserError(f"no --{name}: give one, such as --model=t5_xxl --topology=v5e:16x16")
    try:
        losses.get(values.loss)
    except ValueError as error:
        raise UserError(str(error)) from error
    models = {name: _model(name, values) for name in ("model", "proxy", "golden") if name == "model" or values.online}
    for model in models.values():
        if model:
            make_policy(model)
    lengths = Lengths(values.batch, values.prompt_length, values.samples, values.response_length)
    return PlanConfig(
        topology=parse_topology(values.topology, values.slices),
        mesh=_mesh(values),
        lengths=lengths,
        loss=values.loss,
        optimizer=OptimizerConfig(name=values.optimizer),
        microbatches=values.microbatches,
        evaluate=values.evaluate,
        search=values.search,
        **models,
    )


def _model(name: str, values: flags.FlagValues) -> Any:
    from alignment_gap.models import sizes

    size = values[name].value
    if not size:
        return None
    return sizes.get(size, remat=values.remat if name == "model" else "none", dtype=values.dtype)


def _mesh(values: flags.FlagValues) -> Any:
    from difflib import get_close_matches

    from alignment_gap.sharding import LAYOUTS, MeshConfig

    if values.layout not in LAYOUTS:
        near = get_close_matches(values.layout, LAYOUTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(LAYOUTS)}"
        raise UserError(f"layout {values.layout!r} is unknown: {hint}")
    axes = (values.data_axis, values.fsdp_axis, values.model_axis)
    return MeshConfig(*axes, layout=values.layout, slices=values.slices)
