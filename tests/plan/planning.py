"""The smallest networks, batches and programs for plans, and plans of fake compilations."""

import dataclasses

import numpy as np

from alignment_gap.checkpoints import Network, write_checkpoint
from alignment_gap.checkpoints.tensors import from_array
from alignment_gap.jobs.assembly import BatchShape, Facts
from alignment_gap.jobs.config import JobConfig
from alignment_gap.models import DecoderConfig, T5Config
from alignment_gap.plan.known import MARKERS
from alignment_gap.plan.steps import PlanConfig, Program
from alignment_gap.sharding import MeshConfig
from alignment_gap.sharding.chips import parse_topology

# Every size is a multiple of 8, so eight devices can split it.
T5 = T5Config(vocabulary_size=256, width=64, encoder_layers=2, decoder_layers=2, heads=8, head_size=16, mlp_width=96)
DECODER = DecoderConfig(
    vocabulary_size=256, width=64, layers=2, heads=8, kv_heads=8, head_size=16, mlp_width=96, tied_embeddings=True
)
SHAPE = BatchShape(batch=8, prompt=24, samples=2, response=16)
CPU = parse_topology("cpu:8")


def facts_of(model, shape=SHAPE, kind="policy", **facts):
    return Facts(Network(kind, model, () if kind == "policy" else MARKERS), shape, **facts)


def program_of(kind, model=DECODER, shape=SHAPE, **settings):
    """A program of a policy; a program of kind judge is that of a pairwise preference model."""
    facts = facts_of(model, shape, "pairwise" if kind == "judge" else "policy")
    return Program(kind, kind, facts, **settings)


def config_of(*programs, layout="fsdp", topology=CPU, search=False, **job):
    """A plan of programs; by default only of the update. The job has a start, so its loss has a reference."""
    job = JobConfig(mesh=MeshConfig(layout=layout), start="start", **job)
    return PlanConfig(job, programs or (program_of("update"),), topology, search)


def replaced(program, **shape):
    """The program with other batch sizes."""
    facts = dataclasses.replace(program.facts, batch=dataclasses.replace(program.batch, **shape))
    return dataclasses.replace(program, facts=facts)


def write_run(folder, network, step=1):
    """A run with one checkpoint. It records the network, but has only one small parameter."""
    write_checkpoint(folder, step, network, {"w": from_array(np.ones(3, np.float32))})
    return str(folder)
