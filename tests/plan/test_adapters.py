"""Plans with adapters: update, sampler, reference and a judge on the same base hold the base once."""

import dataclasses

import jax
import pytest
from planning import CPU, DECODER, T5, write_run

from alignment_gap.checkpoints import Network
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import AdapterConfig, Adapters, abstract_parameters, count_parameters, make_policy
from alignment_gap.plan.known import MARKERS, Known, Overrides
from alignment_gap.plan.plan import make_plan
from alignment_gap.plan.programs import compile_here
from alignment_gap.plan.report import as_text
from alignment_gap.plan.steps import PlanConfig, programs_of
from alignment_gap.sharding import MeshConfig

KNOWN = Known(given=Overrides(prompt_length=24, response_length=16))
ADAPTER = AdapterConfig(2, targets=("query", "mlp"))


def job_of(judge, **settings):
    source = OnlineConfig(DatasetConfig("prompts", batch_size=8), judge=JudgeConfig(judge))
    job = JobConfig(model=DECODER, adapter=ADAPTER, source=source, start="runs/sft", mesh=MeshConfig(layout="data"))
    return dataclasses.replace(job, **settings)


def judge_of(folder, base):
    """The folder of a preference model with adapters of rank 4."""
    adapter = AdapterConfig(4)
    return write_run(folder, Network("pairwise", DECODER, MARKERS, adapter=adapter, base=base, base_digest="0"))


def sizes(adapter=ADAPTER):
    """Bytes of the base, and of the adapters."""
    policy = make_policy(DECODER)
    parts = jax.tree.leaves(abstract_parameters(Adapters(policy, adapter).init))
    return 4 * count_parameters(policy), 4 * sum(leaf.size for leaf in parts)


@pytest.mark.parametrize("base", ["runs/sft/checkpoints/6", "runs/sft2/checkpoints/6", "runs/other"])
def test_who_has_the_base_in_memory_once(base, tmp_path):
    _, programs = programs_of(job_of(judge_of(tmp_path / "judge", base)), KNOWN)
    is_same = base == "runs/sft/checkpoints/6"
    found = [(each.name, each.holds, each.shares) for each in programs]
    assert found == [
        ("update", False, False),
        ("sampling", False, False),
        ("judge", True, is_same),
        ("reference", False, True),
    ]
    assert programs[0].facts.network.adapter == ADAPTER and programs[-1].facts.network.adapter is None


def test_another_reference_is_held_too():
    job = job_of(None, source=DatasetConfig("pairs", batch_size=8), reference="runs/other")
    _, programs = programs_of(job, KNOWN)
    assert [(each.name, each.holds, each.shares) for each in programs[1:]] == [("reference", True, False)]


@pytest.mark.slow
def test_memory_is_the_base_once_and_three_times_the_adapters(tmp_path):
    judge = judge_of(tmp_path / "judge", "runs/sft/checkpoints/6")
    job, programs = programs_of(job_of(judge, loss=LossConfig("ipo")), KNOWN)
    plan = make_plan(PlanConfig(job, programs, CPU, search=False), compile_here)
    base, adapters = sizes()
    state = plan.resident["policy and optimizer"]
    assert base + 3 * adapters <= state < base + 3 * adapters + 100
    assert plan.resident.keys() == {"policy and optimizer", "judge", "code"}
    assert plan.resident["judge"] == sizes(AdapterConfig(4))[1]
    by_name = {part.program.name: part.compiled for part in plan.parts}
    assert by_name["update"].parameters == adapters
    assert by_name["sampling"].parameters == base + adapters and by_name["reference"].parameters == base
    # Forward, and the gradients with respect to activations, but not to kernels. Adapters have all three.
    assert by_name["update"].flops < 2.7 * by_name["reference"].flops
    assert f"{base // 4:,} parameters and {adapters // 4:,} of adapters on 8 devices" in as_text(plan)


def test_a_plan_by_size_takes_a_rank():
    job = JobConfig(model=T5, start="runs/sft", source=DatasetConfig("pairs"))
    known = Known(given=Overrides(prompt_length=24, response_length=16, adapter_rank=3))
    _, programs = programs_of(job, known)
    assert programs[0].facts.network.adapter == AdapterConfig(3)
