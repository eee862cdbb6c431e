"""`alignment-gap launch` refuses a command that cannot run; what is on the cluster alone stays unchecked."""

import pytest

from alignment_gap.cli import launch
from alignment_gap.errors import UserError

TRAIN = ["train", "--gin_file=gin/runs/offline_ipo.gin", "--gin.DATASET=nowhere/pairs", "--gin.START=nowhere/sft"]
ON_CLUSTER = ["train", "--gin_file=on_the_cluster.gin"]
JOBSET = ["--jobset.image=image", "--jobset.volume=claim", "--jobset.topology=v5e:4x4"]
QUEUED = ["--queued.topology=v5e:4x4", "--queued.zone=zone", "--queued.folder=/runs"]
ENGINES = {"local": [], "slurm": [], "jobset": JOBSET, "queued": QUEUED}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    launch.main(["alignment-gap launch", *words])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("asked", ["--dry_run", "--nodry_run"])
def test_a_misspelled_macro_is_refused_by_every_engine(engine, asked, tmp_path):
    with pytest.raises(UserError, match="no macro of the gin files has this name: did you mean TRAIN_STEPS"):
        run(f"--engine={engine}", *ENGINES[engine], asked, *TRAIN, "--gin.TRAIN_STPES=5", "--workdir=runs/ipo")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAIN, "--workdri=runs/ipo"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
        ([*ON_CLUSTER, "--workdri=runs/ipo"], "Unknown command line flag 'workdri'"),
        ([*TRAIN, "--gin.BATCH_SIZE=0"], "batch_size is 0: it must be at least 1"),
        ([*TRAIN, "--gin.LossConfig.settings=beta=1"], "LossConfig.settings is 'beta=1': write {'beta': 1}$"),
        ([*TRAIN, "--gin.LossConfig.settings=3"], "LossConfig.settings is 3: write a dict, such as {'beta': 0.1}$"),
        ([*ON_CLUSTER, "--gin.OptimizerConfig.clip_nrom=1"], "OptimizerConfig has no setting .* clip_norm"),
        ([*TRAIN, "--dry_run"], "--dry_run is a flag of launch: write it before train"),
        ([*TRAIN, "--slurm.nodes=2"], "--slurm.nodes is a flag of launch: write it before train"),
        (["study", "--config=configs/study/tiny.py", "--status"], "--status is a flag of launch: .* before study"),
        (["data", "prepare", "--source=posts", "--output=a", "--vocabulry=b"], "Did you mean: vocabulary"),
        (["evaluate", "--run=nowhere", "--promts=4", "--output=a"], "Did you mean: .*prompts"),
        (["data", "vocabulary", "--output=own.model"], "cannot launch 'data vocabulary': choose one of prepare"),
    ],
)
def test_what_the_command_would_refuse_is_one_line(words, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        run("--engine=slurm", "--dry_run", *words)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["slurm", "jobset", "queued"])
def test_a_gin_file_of_the_cluster_is_not_checked_and_a_line_says_so(engine, capsys):
    run(f"--engine={engine}", *ENGINES[engine], "--dry_run", *ON_CLUSTER, "--gin.ITS_MACRO=3", "--workdir=runs/ipo")
    said = capsys.readouterr()
    assert said.err.startswith("ipo: its settings are not checked here: --gin_file=on_the_cluster.gin: there is no")
    assert said.err.count("\n") == 1 and "--gin.ITS_MACRO=3" in said.out


def test_a_file_that_includes_one_of_the_cluster_is_not_checked(tmp_path, capsys):
    (tmp_path / "own.gin").write_text("include 'on_the_cluster.gin'\n")
    run("--engine=slurm", "--dry_run", "train", "--gin_file=own.gin", "--workdir=runs/ipo")
    assert "settings are not checked here" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["--dry_run", "--nodry_run"])
def test_a_gin_file_that_is_not_here_is_refused_if_the_job_runs_here(asked, tmp_path):
    with pytest.raises(UserError, match=r"--gin_file=on_the_cluster.gin: there is no such file"):
        run("--engine=local", asked, *ON_CLUSTER, "--workdir=runs/ipo")
    assert not list(tmp_path.iterdir())


def test_the_status_of_a_job_needs_no_gin_files(capsys):
    run("--status", *ON_CLUSTER, "--workdir=runs/ipo")
    assert capsys.readouterr().out.split() == ["ipo", "ready"]


def test_inputs_need_not_be_here(capsys):
    for words in (
        [*TRAIN, "--workdir=runs/ipo"],
        ["evaluate", "--run=nowhere", "--dataset=nowhere", "--output=runs/ipo"],
        ["data", "label", "--dataset=nowhere", "--judge=nowhere", "--output=runs/ipo"],
    ):
        run("--engine=slurm", "--dry_run", *words)
        assert "#SBATCH" in capsys.readouterr().out
