"""Plans of fake compilations as text and as JSON."""

import dataclasses
import json

import pytest
from made_up import POLICY, compile_, online_config, plan_of, update_config

from alignment_gap.models import count_parameters, make_policy
from alignment_gap.plan.plan import make_plan
from alignment_gap.plan.report import as_json, as_text
from alignment_gap.plan.roofline import Moved
from alignment_gap.sharding.chips import GIB, parse_topology


def lines_of(plan, start):
    return [line for line in as_text(plan).splitlines() if line.startswith(start)]


def test_the_head_says_what_is_planned():
    head = as_text(plan_of(update_config())).splitlines()[:2]
    count = count_parameters(make_policy(POLICY))
    assert head[0] == f"{count:,} parameters on 8 devices (v5e:2x4), mesh data=1 fsdp=8 model=1"
    assert head[1] == "batch 64 prompts of 1024 tokens, 2 responses of 128"


def test_slices_are_named():
    plan = plan_of(dataclasses.replace(update_config(), topology=parse_topology("v5e:2x4", 2)))
    assert "16 devices (v5e:2x4, 2 slices)" in as_text(plan)


def test_memory_in_gib():
    plan = plan_of(online_config())
    update, sample, *_ = (line.split() for line in as_text(plan).splitlines()[4:8])
    # Arguments, outputs, aliased, temporaries, code and their peak.
    assert update == ["update", "3.00", "3.00", "3.00", "6.40", "0.25", "9.65"]
    assert sample == ["sample", "1.00", "0.00", "0.00", "3.20", "0.25", "4.45"]
    (resident,) = lines_of(plan, "resident")
    assert resident.endswith("policy and optimizer 3.00, judge 0.25, score 1.00, code 1.00")
    assert lines_of(plan, "and 6.40") == ["and 6.40 that a program of the step works in; in all 11.65 of 15.75 GiB"]


def test_times_and_flops():
    plan = plan_of(online_config())
    update = lines_of(plan, "update")[1].split()
    # Half a second of arithmetic on eight chips, a quarter of it recomputation; and a second of traffic.
    assert update[1:6] == ["500", "1,000", "0", "1,000", "HBM"]
    assert [float(count) for count in update[6:]] == pytest.approx([591, 197])
    (step,) = lines_of(plan, "a step")
    assert step == "a step 4 s, 16 prompts/s, MFU 47%, at best"


def test_the_hours_of_a_job_whose_calls_are_known():
    config = online_config()
    timed = dataclasses.replace(
        config, programs=tuple(dataclasses.replace(each, calls=1800) for each in config.programs)
    )
    assert lines_of(plan_of(timed), "the whole job") == ["the whole job 2 hours, 16 device-hours, at best"]
    assert as_json(plan_of(timed))["job_seconds"] == 7200
    assert lines_of(plan_of(config), "the whole job") == []
    assert as_json(plan_of(config))["job_seconds"] is None


def test_a_sampler_tells_its_time_a_token():
    (line,) = lines_of(plan_of(online_config()), "sample: ")
    assert line.startswith("sample: 7.81 ms a token")
    assert "once takes 0.66" in line


def moving(config, program):
    rows = [Moved("all-gather", "fsdp", 8, 1200, int(2.5 * GIB), 0.25 - i / 100) for i in range(6)]
    return dataclasses.replace(compile_(config, program), collectives=tuple(rows))


def test_the_collectives_that_take_longest():
    plan = make_plan(update_config(), moving)
    rows = as_text(plan).partition("collectives of a call")[2].splitlines()[1:5]
    assert rows[0].split() == ["update", "all-gather", "fsdp", "8", "1,200", "2.50", "250"]
    assert len(rows) == 4
    assert "200" not in as_text(plan).partition("collectives of a call")[2].replace("1,200", "")
    assert "collectives" not in as_text(plan_of(update_config()))


def test_the_verdict():
    assert lines_of(plan_of(update_config()), "fits: ") == [f"fits: {15.75 - 9.65:.2f} GiB a device are free"]
    plan = plan_of(update_config(batch=256, search=True))
    assert lines_of(plan, "largest") == ["largest batch that fits: 120"]
    (verdict,) = lines_of(plan, "does not fit")
    assert verdict == f"does not fit: {3 + 25.6 - 15.75:.2f} GiB a device too many; what would help:"
    assert lines_of(plan, "  --batch=120") == ["  --batch=120: the largest that fits"]


def test_a_program_that_does_not_compile_has_a_peak_and_no_times():
    plan = plan_of(update_config(batch=256))
    memory, time = (line.split() for line in lines_of(plan, "update"))
    assert memory == ["update", "-", "-", "-", "-", "-", "28.60"]
    assert time[1:6] == ["-"] * 5
    assert lines_of(plan, "a step") == []


def test_json_has_everything():
    plan = plan_of(online_config())
    values = json.loads(json.dumps(as_json(plan)))
    assert values["needed"] == sum(values["resident"].values()) + values["working"] == plan.needed
    assert [part["program"]["name"] for part in values["parts"]] == ["update", "sample", "judge", "score"]
    update, sample, *_ = values["parts"]
    assert update["times"] == {"compute": 0.5, "hbm": 1.0, "interconnect": 0, "seconds": 1.0, "bound": "hbm"}
    assert update["compiled"]["peak"] == plan.parts[0].compiled.peak
    assert update["program"]["facts"]["batch"] == {"batch": 64, "prompt": 1024, "samples": 2, "response": 128}
    assert (update["tokens"], sample["tokens"]) == (0, 128)
    assert values["config"]["topology"] == {"kind": "v5e", "shape": [2, 4], "slices": 1}
    assert values["config"]["job"]["mesh"]["layout"] == "fsdp"
    assert (values["devices"], values["fits"], values["step_seconds"]) == (8, True, 4.0)
    assert values["parameters"] == count_parameters(make_policy(POLICY))


def test_json_of_what_does_not_fit_is_valid():
    values = json.loads(json.dumps(as_json(plan_of(update_config(batch=256, search=True))), allow_nan=False))
    assert values["step_seconds"] is values["utilisation"] is None
    assert values["parts"][0]["times"] is None
    assert values["largest_batch"] == 120
    assert any(line.startswith("--batch=120") for line in values["advice"])
