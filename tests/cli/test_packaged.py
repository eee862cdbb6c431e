"""Gin files and configs of the package are found from any folder; files of that folder come first."""

import pytest

from alignment_gap.cli import gin_files, packaged, study
from alignment_gap.errors import UserError

SFT = "gin/runs/sft.gin"


def settings_of(*words):
    _, settings = study.read(["alignment-gap study", *words], lambda values: None, "")
    return settings


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_gin_file_of_the_package_is_found_and_named(empty, capsys):
    assert gin_files.read_config([SFT], ["DATASET=pairs"]).loss.name == "sft"
    ours = packaged.FILES / SFT
    assert capsys.readouterr().err == f"--gin_file={SFT} is not in this folder: taken from {ours}\n"
    assert ours.is_file()


def test_a_file_of_this_folder_comes_first(empty, capsys):
    (empty / "gin" / "runs").mkdir(parents=True)
    (empty / SFT).write_text("include 'gin/runs/offline_ipo.gin'\nBETA = 0.25\n")
    assert gin_files.read_config([SFT], ["DATASET=pairs", "START=runs/sft"]).loss.settings == {"beta": 0.25}
    assert capsys.readouterr().err == ""


def test_a_folder_of_search_paths_comes_before_the_package(empty, capsys):
    (empty / "mine" / "gin" / "runs").mkdir(parents=True)
    (empty / "mine" / SFT).write_text("include 'runs/offline_ipo.gin'\n")
    assert gin_files.read_config([SFT], ["DATASET=pairs", "START=runs/sft"], ["mine"]).loss.name == "ipo"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("word", "name"), [("configs/study/paper.py", "paper"), ("configs/study/scaling.py:palm", "scaling palm")]
)
def test_a_config_of_the_package_is_found_with_what_it_loads(word, name, empty, capsys):
    assert settings_of(f"--config={word}")["name"] == name
    file = word.partition(":")[0]
    assert f"--config={file} is not in this folder: taken from {packaged.FILES / file}\n" in capsys.readouterr().err


def test_the_flag_and_its_file_may_be_two_words(empty):
    words = ["--config", "configs/study/paper.py", "--config.seeds=2"]
    assert settings_of(*words) == settings_of("--config=configs/study/paper.py", "--config.seeds=2")
    with pytest.raises(UserError, match="no --config: give a study's config file"):
        settings_of("--config")


def test_a_config_of_this_folder_comes_first(empty, capsys):
    (empty / "configs" / "study").mkdir(parents=True)
    (empty / "configs" / "study" / "tiny.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'name': 'mine'})\n"
    )
    assert settings_of("--config=configs/study/tiny.py") == {"name": "mine"}
    assert capsys.readouterr().err == ""


def test_a_file_that_is_nowhere(empty):
    with pytest.raises(UserError, match=r"--gin_file=gin/runs/no.gin: there is no such file in \., .*gin$"):
        gin_files.read_config(["gin/runs/no.gin"], [])
    with pytest.raises(
        UserError, match=r"gin/models/t5_tny.gin: there is no .*: did you mean gin/models/t5_tiny.gin\?$"
    ):
        gin_files.read_config(["gin/models/t5_tny.gin"], [])
    with pytest.raises(UserError, match=r"gin/losses/nope.gin: there is .*: gin/losses has best_of_n.gin, dpo.gin, "):
        gin_files.read_config(["gin/losses/nope.gin"], [])
    with pytest.raises(UserError, match=r"--config=configs/no.py: there is no such file; .*configs/study has some"):
        settings_of("--config=configs/no.py")
