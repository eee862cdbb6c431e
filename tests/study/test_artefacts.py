"""An artefact is complete or absent, and named by all that it was made from."""

import errno

import pytest

from alignment_gap.cli.main import guarded
from alignment_gap.study.artefacts import Stage, make


def stage(name="a", settings=None, inputs=(), run=lambda folder, progress: None):
    return Stage(name, settings or {}, inputs, run, 1)


def quiet(units):
    del units


def test_the_name_follows_the_settings_and_the_inputs_and_nothing_else():
    base = stage(settings={"steps": 1})
    assert base.key == stage(name="other", settings={"steps": 1}, run=print).key
    assert base.key != stage(settings={"steps": 2}).key
    assert stage("b", inputs=(base,)).key != stage("b", inputs=(stage(settings={"steps": 2}),)).key


def test_a_stage_that_fails_leaves_no_artefact_and_goes_on_with_what_it_had(tmp_path):
    seen = []

    def run(folder, progress):
        seen.append(sorted(path.name for path in folder.iterdir()))
        (folder / "half").write_text("x")
        if len(seen) == 1:
            raise RuntimeError("killed")

    failing = stage(run=run)
    with pytest.raises(RuntimeError, match="killed"):
        make(failing, tmp_path, quiet)
    assert not failing.folder(tmp_path).exists()
    folder = make(failing, tmp_path, quiet)
    assert seen == [[], ["half"]]
    assert sorted(path.name for path in folder.iterdir()) == ["artefact.json", "half"]
    make(failing, tmp_path, quiet)
    assert len(seen) == 2


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path, capsys):
    done = make(stage(), tmp_path, quiet)

    def full(folder, progress):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "params"))

    assert guarded(lambda: make(stage("b", run=full), tmp_path, quiet) and None) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the disk is full") and message.count("\n") == 1
    assert (done / "artefact.json").exists()


def test_a_full_disk_reported_in_another_library_s_words_is_recognised(capsys):
    def full():
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

    assert guarded(full) == 2
    assert "free some space" in capsys.readouterr().err


def test_any_other_failure_keeps_its_traceback():
    def bug():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        guarded(bug)
