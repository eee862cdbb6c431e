"""The plan command as a user types it: for jobs of gin files, for a study, and for a size."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import pytest

from alignment_gap.cli import plan as command
from alignment_gap.cli.main import main
from alignment_gap.errors import UserError
from alignment_gap.jobs.assembly import BatchShape
from alignment_gap.models import DecoderConfig, T5Config, sizes
from alignment_gap.plan import programs
from alignment_gap.plan.kept import kept

ROOT = pathlib.Path(__file__).parents[2]
STUDY = f"--config={ROOT / 'configs' / 'study' / 'tiny.py'}"
TINY = DecoderConfig(vocabulary_size=256, width=16, layers=1, heads=2, kv_heads=2, head_size=8, mlp_width=16)
TPU = "--topology=v5e:2x4"
LENGTHS = ["--batch=8", "--prompt_length=16", "--response_length=8"]
SIZES = ["--model=tiny", "--judge=t5_large", *LENGTHS]
FOLDERS = {
    "DATASET": "prepared/train",
    "PROMPTS": "prepared/train",
    "START": "runs/sft",
    "JUDGE": "runs/proxy",
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def gin(run, *names):
    """The words for one of our gin files, with the folders that it reads. The folders do not exist."""
    return [f"--gin_file={ROOT / 'gin' / 'runs' / run}.gin", *(f"--gin.{name}={FOLDERS[name]}" for name in names)]


def read(*arguments):
    config, _ = command.read_config(["alignment-gap plan", *arguments])
    return config


def names(config):
    return [program.name for program in config.programs]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["alignment-gap", "plan", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, capsys.readouterr()


@pytest.mark.slow
def test_a_plan_on_virtual_devices(monkeypatch, capsys, tmp_path):
    path = tmp_path / "new" / "plan.json"
    flags = ["--model=tiny", "--topology=cpu:2", *LENGTHS, "--nosearch", f"--json={path}"]
    status, said = run(monkeypatch, capsys, *flags)
    assert status == 0
    assert "fits:" in said.out
    assert said.err == "compiling update for 2 devices of cpu:2, batch 8, width 16\n"
    values = json.loads(path.read_text())
    assert values["fits"]
    (update,) = values["parts"]
    assert update["program"]["facts"]["batch"] == {"batch": 8, "prompt": 16, "samples": 2, "response": 8}
    assert update["program"]["facts"]["network"]["model"]["dtype"] == "bfloat16"
    assert update["compiled"]["temporaries"] > 0


def test_what_does_not_fit_is_exit_status_1_without_a_traceback(monkeypatch, capsys):
    huge = programs.Compiled(parameters=1, state=3, exceeded=2**45)
    monkeypatch.setattr("alignment_gap.plan.kept.kept", lambda folder, say: lambda config, program: huge)
    status, said = run(monkeypatch, capsys, "--model=tiny", TPU, *LENGTHS, "--nosearch")
    assert status == 1
    assert "does not fit: 32752.25 GiB a device too many" in said.out
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("run", "folders", "expected"),
    [
        ("sft", ["DATASET"], ["update"]),
        ("offline_ipo", ["DATASET", "START"], ["update", "reference"]),
        ("online_ipo", ["PROMPTS", "START", "JUDGE"], ["update", "sampling", "judge", "reference"]),
        ("online_grpo", ["PROMPTS", "START", "JUDGE"], ["update", "sampling", "judge", "reference"]),
        ("nash_md", ["PROMPTS", "START", "JUDGE"], ["update", "sampling", "opponents", "judge", "reference"]),
        ("ipo_md", ["PROMPTS", "START", "JUDGE"], ["update", "sampling", "judge", "reference"]),
        ("preference_model", ["DATASET", "START"], ["update"]),
        ("hypo", ["DATASET", "START"], ["update", "sampling", "reference", "reference, fresh"]),
    ],
)
@pytest.mark.parametrize("topology", [TPU, "--topology=v5p:2x2x2"])
def test_every_run_of_ours_is_planned_before_its_folders_are_there(run, folders, expected, topology):
    config = read(*gin(run, *folders), *SIZES, topology)
    assert names(config) == expected
    assert config.programs[0].model == TINY
    assert {(each.batch.batch, each.batch.prompt, each.batch.response) for each in config.programs} == {(8, 16, 8)}
    judges = [each.model for each in config.programs if each.kind == "judge"]
    assert judges in ([], [sizes.get("t5_large")])


def test_macros_say_what_train_is_told():
    xxl = f"--gin_file={ROOT / 'gin' / 'models' / 't5_xxl.gin'}"
    settings = ["MICROBATCHES=2", "BATCH_SIZE=64", "REFRESH_EVERY=4", "MeshConfig.layout=fsdp", "T5Config.remat=full"]
    words = [*gin("online_ipo", "PROMPTS", "START"), "--gin.JUDGE=rubric", xxl]
    lengths = ["--prompt_length=1024", "--response_length=128"]
    config = read(*words, *(f"--gin.{setting}" for setting in settings), *lengths, TPU)
    assert names(config) == ["update", "sampling", "reference"]
    assert config.programs[0].model == sizes.get("t5_xxl", remat="full")
    assert config.programs[0].batch == BatchShape(64, 1024, 2, 128)
    assert (config.job.microbatches, config.job.mesh.layout, config.job.online.refresh_every) == (2, "fsdp", 4)


def test_flags_go_before_macros():
    words = [*gin("offline_ipo", "DATASET", "START"), "--gin.MICROBATCHES=2", "--gin.MeshConfig.layout=fsdp", *SIZES]
    config = read(*words, TPU, "--microbatches=4", "--layout=tensor", "--slices=2", "--optimizer=sgd", "--remat=dots")
    assert (config.job.microbatches, config.job.mesh.layout, config.job.optimizer.name) == (4, "tensor", "sgd")
    assert (config.topology.slices, config.topology.devices) == (2, 16)
    assert config.programs[0].model.remat == "dots"


def test_slices_of_a_job_are_those_of_the_topology():
    config = read(*gin("sft", "DATASET"), "--gin.MeshConfig.slices=2", *SIZES, TPU)
    assert config.topology.devices == 16


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("seed0-sft", ["update"]),
        ("seed0-golden", ["update"]),
        ("seed0-relabelled-train", ["judge"]),
        ("seed0-online-ipo-beta0.1-lr0.0003", ["update", "sampling", "judge", "reference"]),
        ("seed0-shuffled-ipo-beta0.1-lr0.0003", ["update"]),
        ("seed0-offline-ipo-beta0.1-lr0.0003", ["update", "reference"]),
        ("seed0-opponent-golden", ["sampling 0"]),
        ("seed0-evaluation-sft", ["sampling", "KL", "classification", "judge golden", "judge proxy"]),
        ("seed0-judge-proxy-train", ["judge run"]),
    ],
)
def test_every_kind_of_a_studys_jobs(job, expected):
    config = read(STUDY, f"--job={job}", TPU)
    assert names(config) == expected
    # All jobs of the study have one shape. None of its files exists.
    assert {type(each.model) for each in config.programs} == {T5Config}
    assert {each.model.width for each in config.programs} == {64}
    assert {each.batch.prompt for each in config.programs} == {512}


def test_a_studys_settings_and_the_flags_reach_its_job():
    config = read(STUDY, "--config.microbatches=2", "--job=seed0-sft", "--batch=32", "--layout=fsdp", TPU)
    assert (config.job.microbatches, config.job.mesh.layout) == (2, "fsdp")
    assert config.programs[0].batch.batch == 32


def test_a_study_over_sizes_is_planned_for_one_of_them():
    scaling = f"--config={ROOT / 'configs' / 'study' / 'scaling.py'}"
    config = read(scaling, "--config.sizes=('palm_30m',)", "--job=seed0-sft", TPU)
    vocabulary_size = config.programs[0].model.vocabulary_size
    assert config.programs[0].model == sizes.get("palm_30m", vocabulary_size=vocabulary_size, scan_unroll=2)
    with pytest.raises(UserError, match=r"name one of the sizes, such as --config.sizes=\"\('t5_30k',\)\""):
        read(scaling, "--job=seed0-sft", TPU)


@pytest.fixture
def made_up(monkeypatch):
    """A compiler that says at once that every program takes a second of HBM traffic; returns what it compiled."""
    compiled = []

    def compile_(config, program):
        compiled.append(program.name)
        return programs.Compiled(parameters=1, traffic=int(config.topology.chip.hbm_bandwidth))

    monkeypatch.setattr("alignment_gap.plan.kept.kept", functools.partial(kept, compile_=compile_))
    return compiled


@pytest.mark.slow
def test_a_whole_study(monkeypatch, capsys, tmp_path, made_up):
    path, flags = tmp_path / "plan.json", [STUDY, TPU, f"--kept={tmp_path / 'kept'}"]
    status, said = run(monkeypatch, capsys, *flags, f"--json={path}")
    assert status == 0
    jobs = {each["job"]: each for each in json.loads(path.read_text())["jobs"]}
    assert len(jobs) == 28
    assert jobs["seed0-data"]["plan"] is None
    # Each update of the online arm comes with three other programs.
    online, shuffled = (jobs[f"seed0-{arm}-ipo-beta0.1-lr0.0003"] for arm in ("online", "shuffled"))
    assert online["seconds"] == pytest.approx(4 * shuffled["seconds"])
    assert "jobs on 8 devices" in said.out and "longest chain" in said.out
    assert said.err.count("compiling") == len(made_up) < len(jobs)
    count = len(made_up)
    status, said = run(monkeypatch, capsys, *flags)
    assert (status, len(made_up), said.err) == (0, count, "")


@pytest.mark.slow
def test_a_whole_study_over_sizes(monkeypatch, capsys, tmp_path, made_up):
    """Jobs that all sizes share are planned once; the others are named by their size."""
    path = tmp_path / "plan.json"
    scaling = [f"--config={ROOT / 'configs' / 'study' / 'scaling.py'}", "--config.sizes=('t5_30k','t5_300k')"]
    status, _ = run(monkeypatch, capsys, *scaling, TPU, f"--json={path}")
    assert status == 0
    names = [each["job"] for each in json.loads(path.read_text())["jobs"]]
    assert len(set(names)) == len(names)
    assert "seed0-golden" in names and "t5_30k seed0-golden" not in names
    assert {"t5_30k seed0-sft", "t5_300k seed0-sft"} <= {*names}


def test_without_a_job_it_is_the_papers():
    config = read("--model=t5_xl", "--topology=v5p:4x4x4", "--online", "--judge=t5_large", "--dtype=float32")
    assert names(config) == ["update", "sampling", "judge", "reference"]
    policy, judge = (sizes.get(name, dtype="float32", remat="full") for name in ("t5_xl", "t5_large"))
    assert [each.model for each in config.programs] == [policy, policy, judge, policy]
    assert config.programs[0].batch == BatchShape(512, 1024, 2, 128)
    assert config.job.mesh.layout == "fsdp"
    offline = read("--model=tiny", TPU)
    assert names(offline) == ["update"]
    assert offline.search
    # A size has no number of steps.
    assert {each.calls for each in (*config.programs, *offline.programs)} == {None}
    assert not read("--model=tiny", TPU, "--nosearch").search


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "no --topology"),
        ([TPU], "no --model"),
        (["--model=t5_xxxl", TPU], "'t5_xxxl' is unknown: did you mean t5_x"),
        (["--model=tiny", "--topology=v5f:16x16"], "did you mean v5"),
        (["--model=tiny", TPU, "--layout=fsdb"], "'fsdb' is unknown: choose one of data, fsdp"),
        (["--model=tiny", TPU, "--batch=100"], "batch is 100: it must be a multiple of"),
        (["--model=tiny", TPU, "--batch=0"], "--batch is 0: it must be at least 1"),
        (["--model=tiny", TPU, "--optimizer=adam"], "adamw"),
        (["--model=tiny", TPU, "--remat=ful"], "full"),
        (["--model=tiny", TPU, "--online", "--judge=t5_larg"], "did you mean t5_large"),
        (["--model=tiny", "--topology=cpu:8", "--slices=2"], "slices is 2"),
        (["--model=tiny", TPU, "more"], "unexpected argument 'more'"),
        (["--model=tiny", TPU, "--golden=t5_large"], "golden"),
        ([*gin("offline_ipo", "DATASET"), TPU], "START is not set: add --gin.START=value"),
        ([*gin("offline_ipo", "DATASET", "START"), TPU, *LENGTHS], "runs/sft is not there yet.*give --model"),
        ([*gin("offline_ipo", "DATASET", "START"), TPU, "--model=tiny"], "prepared/train is not.*--prompt_length"),
        (
            [*gin("online_ipo", "PROMPTS", "START", "JUDGE"), TPU, "--model=tiny", *LENGTHS],
            "runs/proxy is not there yet.*give --judge",
        ),
        ([*gin("sft", "DATASET"), TPU, "--gin.NO_MACRO=1"], "NO_MACRO"),
        (["--model=tiny", TPU, "--gin.NO_MACRO=1"], "the command names no gin file; give one with --gin_file"),
        (["--gin_file=none.gin", TPU], "there is no such file"),
        (["--model=t5_tiny", TPU, "--judge=t5_tiny"], "--judge=t5_tiny: only an online step has a judge; add --online"),
        ([STUDY, TPU, "--best=best.gin"], "--best searches the settings of one job: name it by --job"),
        ([STUDY, TPU, "--config.mesh.layout=fsdp", "--batch=12"], "^error: seed0-sft: batch is 12: it must be"),
        (["--job=seed0-sft", TPU], "--config and --job"),
        ([STUDY, "--job=seed0-sft", *gin("sft", "DATASET"), TPU], "but not by both"),
        ([STUDY, "--job=seed0-stf", TPU], "has no job 'seed0-stf': did you mean seed0-sft"),
        ([STUDY, "--job=seed0-data", TPU], "computes on no device"),
        ([STUDY, "--config.no_setting=1", "--job=seed0-sft", TPU], "no_setting"),
        (["--config=none.py", "--job=seed0-sft", TPU], "none.py"),
    ],
)
def test_wrong_words_are_one_line_and_compile_nothing(monkeypatch, capsys, flags, says):
    monkeypatch.setattr(programs.subprocess, "run", None)
    status, said = run(monkeypatch, capsys, *flags)
    assert status == 2
    assert len(said.err.splitlines()) == 1
    assert re.search(says, said.err)


def test_help_names_the_flags_of_the_overrides(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alignment-gap", "plan", "--help"])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    for flag in ("--topology", "--model", "--judge", "--prompt_length", "--layout", "--gin_file", "--[no]search"):
        assert flag in said


def test_planning_needs_no_tensorflow(without_tensorflow):
    code = (
        "import sys; from alignment_gap.cli.plan import read_config; "
        f"read_config(['plan', '--model=t5_large', '{TPU}']); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=without_tensorflow, check=True)
