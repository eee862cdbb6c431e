"""Plans of whole graphs, with a fake compiler: every program once, and the sums by hand."""

import dataclasses
from pathlib import Path

import pytest
from made_up import JUDGE, POLICY, compile_

from alignment_gap.errors import UserError
from alignment_gap.jobs.compose import COMPOSE, ComposeConfig
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.folder import Job
from alignment_gap.jobs.label import LABEL, LabelConfig
from alignment_gap.jobs.train import TRAIN
from alignment_gap.judges import JudgeConfig
from alignment_gap.plan.graph import longest_chain, plan_graph, side_by_side
from alignment_gap.plan.kept import kept
from alignment_gap.plan.known import Overrides
from alignment_gap.plan.report import graph_json, graph_text
from alignment_gap.sharding import MeshConfig
from alignment_gap.training import OptimizerConfig

GIVEN = Overrides(prompt_length=1024, response_length=128, examples=640)
FSDP = MeshConfig(layout="fsdp")


def trained(name, *needs, source=None, **settings):
    config = JobConfig(source=source or DatasetConfig("data", batch_size=64), mesh=FSDP, **settings)
    return Job(name, TRAIN, config, Path("jobs") / name, needs)


SFT = trained("sft", model=POLICY, loss=LossConfig("sft"), steps=3600)
JUDGING = trained("golden", kind="pairwise", model=JUDGE, steps=7200)
LABELS = LabelConfig("data", JudgeConfig("jobs/golden"), batch_size=64, mesh=FSDP)
LABELLED = Job("labelled", LABEL, LABELS, Path("jobs/labelled"), (JUDGING,))
RUBRIC = dataclasses.replace(LABELS, judge=JudgeConfig("rubric"))
BY_HAND = Job("by_hand", LABEL, RUBRIC, Path("jobs/by_hand"))
CUT = Job("cut", COMPOSE, ComposeConfig(("jobs/labelled",), limit=64), Path("jobs/cut"), (LABELLED,))
PAIRS = DatasetConfig("jobs/cut", batch_size=64)
SWEEP = [
    trained(
        f"offline-{beta}-{rate}",
        SFT,
        CUT,
        source=PAIRS,
        start="jobs/sft",
        steps=1800,
        loss=LossConfig("ipo", {"beta": beta}),
        optimizer=OptimizerConfig(learning_rate=rate),
    )
    for beta in (0.1, 0.5)
    for rate in (1e-4, 1e-3)
]
ONLINE = trained(
    "online",
    SFT,
    JUDGING,
    source=OnlineConfig(DatasetConfig("data", batch_size=64), judge=JudgeConfig("jobs/golden")),
    start="jobs/sft",
    steps=1800,
)
JOBS = [SFT, JUDGING, LABELLED, BY_HAND, CUT, *SWEEP, ONLINE]


@pytest.fixture
def said():
    return []


@pytest.fixture
def planned(said):
    return plan_graph(JOBS, "v5e:2x4", GIVEN, kept(None, said.append, compile_))


def test_the_hours_of_every_job(planned):
    """Every made-up program takes a second. Offline steps have two programs, online steps four."""
    hours = {each.job.name: each.seconds / 3600 for each in planned}
    assert hours == {
        "sft": 1,
        "golden": 2,
        "labelled": 10 / 3600,
        "by_hand": 0,
        "cut": 0,
        **dict.fromkeys([job.name for job in SWEEP], 1),
        "online": 2,
    }
    assert [each.device_seconds for each in planned][:2] == [8 * 3600, 16 * 3600]
    assert [each.job.name for each in planned if each.plan is None] == ["by_hand", "cut"]


def test_the_longest_chain(planned):
    """Golden model, then the online run; the labelled pairs take ten seconds, then an offline run an hour."""
    assert longest_chain(planned) == 4 * 3600
    assert longest_chain(planned[:-1]) == 3 * 3600 + 10
    assert longest_chain([]) == 0


def test_side_by_side_a_free_slice_takes_the_first_job_that_can_start(planned):
    """On two slices, the online run takes one from hour 2 to 4. The offline runs begin ten seconds after hour 2."""
    assert side_by_side(planned, 1) == 9 * 3600 + 10
    assert side_by_side(planned, 2) == 5 * 3600 + 10
    assert side_by_side(planned, 3) == 4 * 3600 + 10
    assert side_by_side(planned, 16) == longest_chain(planned) == 4 * 3600
    assert side_by_side([], 2) == 0


def test_what_differs_only_in_numbers_is_compiled_once(planned, said):
    programs = [line.partition(" for")[0] for line in said]
    assert programs == [
        "compiling update",  # of SFT
        "compiling update",  # of the golden model
        "compiling judge",
        "compiling update",  # of all four offline runs
        "compiling reference",
        "compiling update",  # of the online run, whose batch has the sampler's log-probs
        "compiling sampling",
        # Its judge is that of the labels, and its reference that of the offline runs.
    ]


def test_a_table_with_the_dearest_jobs_first(planned):
    _, *rows, total, chain, slices, _, _, _ = graph_text(planned).splitlines()
    assert [row.split("  ")[0] for row in rows] == [
        "offline-0.1-0.0001 and 3 more",
        "golden",
        "online",
        "sft",
        "labelled",
    ]
    assert [cell.strip() for cell in rows[0].split("  ") if cell.strip()] == [
        "offline-0.1-0.0001 and 3 more",
        "1",
        "32",
        "44.4%",
        "update 50%, HBM",
        "10.90",
    ]
    assert total == "8 jobs on 8 devices: 72 device-hours, 9 hours one after another, at best"
    assert chain == "the longest chain of jobs that need each other takes 4 hours"
    assert slices == "side by side on 2, 4, 8, 16 times v5e:2x4: 5, 4, 4, 4 hours"


def test_the_time_of_all_jobs_by_program_and_by_bound(planned):
    """Of nine hours, updates take 5.5: SFT 1, the golden model 2, the four offline runs and the online run a half each.

    Made-up programs read memory for a second and compute for half of it. Three quarters of an update's FLOPs are the
    model's.
    """
    programs, bounds, utilisation = graph_text(planned).splitlines()[-3:]
    assert programs == "by program: update 61%, reference 28%, judge 6%, sampling 6%"
    assert bounds == "bound by: HBM 100%"
    assert utilisation == "MFU 42%, at best"


def test_what_does_not_fit_is_marked():
    large = dataclasses.replace(SFT, config=dataclasses.replace(SFT.config, source=DatasetConfig("d", batch_size=256)))
    planned = plan_graph([large, JUDGING], "v5e:2x4", GIVEN, compile_)
    rows = graph_text(planned).splitlines()[1:3]
    assert [row.rstrip().endswith("does not fit") for row in rows] == [True, False]
    assert not any("MFU" in line for line in graph_text(planned).splitlines())
    assert [each.plan.fits for each in planned] == [False, True]
    found = graph_json(planned)
    assert [each["seconds"] for each in found["jobs"]] == [None, 7200]
    assert found["device_seconds"] is found["longest_chain_seconds"] is None


def test_a_program_that_is_never_called_has_no_share():
    """It does not fit, so that it has no time."""
    (fits,) = plan_graph([SFT], "v5e:2x4", GIVEN, compile_)
    (part,) = fits.plan.parts
    uncalled = dataclasses.replace(part, times=None, program=dataclasses.replace(part.program, name="KL", calls=0))
    both = fits._replace(plan=dataclasses.replace(fits.plan, parts=(part, uncalled)))
    assert graph_text([both]).splitlines()[-3] == "by program: update 100%"


def test_json_has_every_job_and_every_plan_once(planned):
    found = graph_json(planned)
    assert found["device_seconds"] == pytest.approx(8 * 9 * 3600 + 80)
    assert found["longest_chain_seconds"] == 4 * 3600
    assert found["side_by_side_seconds"] == {"2": 5 * 3600 + 10, "4": 4 * 3600 + 10, "8": 4 * 3600, "16": 4 * 3600}
    assert [each["job"] for each in found["jobs"]] == [job.name for job in JOBS]
    # SFT, the golden model and the labels have plans of their own, the offline runs share one, and one job has none.
    assert [each["plan"] for each in found["jobs"]] == [0, 1, 2, None, None, 3, 3, 3, 3, 4]
    assert found["plans"][4]["job_seconds"] == found["jobs"][-1]["seconds"] == 2 * 3600
    assert len(found["plans"]) == 5


def never(config, program):
    raise AssertionError("compiled")


@pytest.mark.parametrize(
    ("job", "given", "says"),
    [
        (
            trained("odd", model=POLICY, loss=LossConfig("sft"), source=DatasetConfig("d", batch_size=60)),
            GIVEN,
            "odd: batch is 60",
        ),
        (trained("new", start="imported"), GIVEN, "new: imported is not there yet.*--networks=imported=SIZE"),
        (LABELLED, dataclasses.replace(GIVEN, examples=None), "labelled: .*give --examples"),
    ],
)
def test_a_job_that_cannot_be_planned_is_named_before_anything_is_compiled(job, given, says):
    with pytest.raises(UserError, match=says):
        plan_graph([SFT, JUDGING, job], "v5e:2x4", given, never)
