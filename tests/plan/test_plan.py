"""Plans of made-up compilations that add up by hand."""

import dataclasses
import json

import pytest

from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, T5Config
from alignment_gap.plan.chips import GIB, parse_topology
from alignment_gap.plan.flops import Lengths
from alignment_gap.plan.plan import PlanConfig, make_plan
from alignment_gap.plan.programs import Compiled
from alignment_gap.plan.report import as_json, as_text, write_picture
from alignment_gap.sharding import MeshConfig
from alignment_gap.training import OptimizerConfig

POLICY = T5Config(vocabulary_size=256, dtype="bfloat16", remat="full")
PROXY, GOLDEN = dataclasses.replace(POLICY, width=32), dataclasses.replace(POLICY, width=128)
PARAMETERS = {POLICY: GIB, dataclasses.replace(POLICY, remat="none"): GIB, PROXY: 0.25 * GIB, GOLDEN: 2 * GIB}
CONFIG = PlanConfig(
    POLICY, parse_topology("v5e:2x4"), MeshConfig(layout="fsdp"), Lengths(64, 1024, 2, 128), search=False
)


def compile_(request):
    """State of three times the parameters; 0.1 GiB of temporaries a prompt, half of it for other programs; code."""
    update, parameters = request.program == "update", int(PARAMETERS[request.model])
    state = 3 * parameters if update else 0
    temporaries = int((0.1 if update else 0.05) * GIB * request.lengths.batch)
    if temporaries > 12 * GIB:
        return Compiled(parameters, state, exceeded=int(state or parameters) + temporaries)
    return Compiled(
        parameters=parameters,
        state=state,
        arguments=state or parameters,
        outputs=state,
        aliased=state,
        temporaries=temporaries,
        code=int(0.125 * GIB),
        traffic=int(819e9),
    )


def plan_of(**changes):
    return make_plan(dataclasses.replace(CONFIG, **changes), compile_, say=lambda line: None)


def test_an_offline_step_is_the_update_alone():
    plan = plan_of()
    assert [(part.name, part.in_step) for part in plan.parts] == [
        ("update", True),
        ("sampling", False),
        ("labels", False),
    ]
    assert plan.needed == pytest.approx((3 + 0.125 + 6.4) * GIB, rel=1e-6)
    assert plan.fits
    assert plan.step_seconds == pytest.approx(1.0)
    assert plan.advice == ()


def test_online_all_four_networks_stay_and_one_program_works_at_a_time():
    plan = plan_of(proxy=PROXY, golden=GOLDEN)
    assert {name: size / GIB for name, size in plan.resident.items()} == {
        "policy and optimizer": 3.0,
        "reference": 1.0,
        "proxy labels": 0.25,
        "golden labels": 2.0,
        "code": 5 * 0.125,
    }
    assert plan.working == pytest.approx(6.4 * GIB, rel=1e-6)
    assert plan.needed == pytest.approx((6.25 + 0.625 + 6.4) * GIB, rel=1e-6)
    assert plan.step_seconds == pytest.approx(5.0)


@pytest.mark.parametrize("batch", [8, 64, 512])
def test_the_largest_batch_is_found_from_either_side(batch):
    # 3 + 0.125 GiB stay: (15.75 - 3.125) / 0.1 = 126 prompts, of which the compiler refuses more than 120.
    lengths = dataclasses.replace(CONFIG.lengths, batch=batch)
    asked = []

    def recorded(request):
        asked.append(request)
        return compile_(request)

    plan = make_plan(
        dataclasses.replace(CONFIG, lengths=lengths, search=True, evaluate=False), recorded, lambda _: None
    )
    assert plan.largest_batch == 120
    assert 120 in [request.lengths.batch for request in asked]
    assert len(asked) <= 5


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    plan = plan_of(lengths=dataclasses.replace(CONFIG.lengths, batch=256), evaluate=False, search=True)
    text = as_text(plan)
    assert not plan.fits
    # 3 GiB of state and 25.6 of temporaries.
    assert f"{3 + 25.6 - 15.75:.2f} GiB a device too many" in text
    assert "--batch=120" in text
    assert "--microbatches=32" in text
    assert "--optimizer=adafactor: 2.0 GiB less" in text
    assert "16 devices" in text
    assert "--remat" not in text
    assert as_json(plan)["step_seconds"] is None


def test_settings_that_are_not_yet_taken_are_named():
    config = DecoderConfig()
    assert config.remat == "none"
    PARAMETERS[config] = 8 * GIB
    text = as_text(plan_of(model=config, evaluate=False, mesh=MeshConfig(layout="data")))
    for setting in ("--remat=full", "--layout=fsdp", "--dtype=bfloat16"):
        assert setting in text
    adafactor = plan_of(model=config, evaluate=False, optimizer=OptimizerConfig("adafactor"))
    assert "--optimizer" not in as_text(adafactor)


def test_a_batch_that_the_mesh_does_not_divide_is_refused_before_anything_is_compiled():
    def never(request):
        raise AssertionError("compiled")

    config = dataclasses.replace(CONFIG, lengths=dataclasses.replace(CONFIG.lengths, batch=12))
    with pytest.raises(UserError, match=r"batch is 12: .* multiple of 8"):
        make_plan(config, never)


def test_json_and_picture(tmp_path):
    plan = plan_of(proxy=PROXY)
    values = json.loads(json.dumps(as_json(plan)))
    assert values["needed"] == sum(values["resident"].values()) + values["working"]
    assert [part["name"] for part in values["programs"]] == ["update", "sampling", "reference", "proxy labels"]
    assert values["programs"][0]["times"]["bound"] == "hbm"
    write_picture(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    write_picture(plan, tmp_path / "plan.svg")
    assert "golden" not in (tmp_path / "plan.svg").read_text()
    with pytest.raises(UserError, match=r"ends in \.png or \.svg"):
        write_picture(plan, tmp_path / "plan.pdf")
