"""A fake compiler: its figures follow from the network and the batch of a program."""

import dataclasses

from planning import config_of, program_of, replaced

from alignment_gap.jobs.config import OnlineConfig
from alignment_gap.models import T5Config
from alignment_gap.plan.plan import make_plan
from alignment_gap.plan.programs import Compiled
from alignment_gap.sharding.chips import GIB, parse_topology

POLICY = T5Config(vocabulary_size=256, dtype="bfloat16", remat="full")
JUDGE = dataclasses.replace(POLICY, width=32)
# GiB of parameters on a device, by the width of the network; 8 for other widths.
PARAMETERS = {32: 0.25, POLICY.width: 1.0}
V5E = parse_topology("v5e:2x4")
PAPER = {"prompt": 1024, "response": 128}


def compile_(config, program):
    """State is three times the parameters. Temporaries are 0.1 GiB for each prompt, half of it outside the update.

    Every program moves HBM for a second, and every device computes for half a second. It refuses more than 12 GiB of
    temporaries.
    """
    update = program.kind == "update"
    parameters = int(PARAMETERS.get(program.model.width, 8) * GIB)
    state = 3 * parameters if update else 0
    networks = 2 if program.kind == "divergence" else 1
    temporaries = int((0.1 if update else 0.05) * GIB * program.batch.batch)
    flops = int(0.5 * 197e12) * config.topology.devices
    counted = Compiled(parameters, state, networks, flops, int(0.75 * flops) if update else flops)
    if temporaries > 12 * GIB:
        return dataclasses.replace(counted, exceeded=(state or parameters) + temporaries)
    return dataclasses.replace(
        counted,
        arguments=state or networks * parameters,
        outputs=state,
        aliased=state,
        temporaries=temporaries,
        code=int(0.25 * GIB),
        traffic=int(819e9),
    )


def update_config(model=POLICY, batch=64, programs=None, **settings):
    """An offline plan on eight chips."""
    programs = programs or (program_of("update", model),)
    programs = [replaced(program, batch=batch, **PAPER) for program in programs]
    return config_of(*programs, **({"topology": V5E} | settings))


def online_config():
    """An online plan. The reference's program is named score."""
    programs = (
        program_of("update", POLICY),
        program_of("sample", POLICY),
        program_of("judge", JUDGE, holds=True),
        program_of("score", POLICY, holds=True),
    )
    return update_config(programs=programs, source=OnlineConfig())


def plan_of(config):
    return make_plan(config, compile_)
