"""Files are replaced as a whole; one process and one set of settings own a folder."""

import contextlib
import errno
import json
import os
import threading

import pytest

from alignment_gap.errors import InUse, UserError
from alignment_gap.folders import JOB, STUDY, at, check_settings, locked, write_json


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    write_json(tmp_path / "a.json", {"b": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert '"b": 2' in (tmp_path / "a.json").read_text()


def test_a_folder_holds_a_job_or_a_study(tmp_path):
    for first, second in ((JOB, STUDY), (STUDY, JOB)):
        (tmp_path / first).mkdir()
        check_settings(tmp_path / first / first, {"steps": 1}, remedy="go")
        write_json(tmp_path / first / first, {"steps": 1})
        with pytest.raises(UserError, match=f"holds a {first[:-5]} already: give another folder"):
            check_settings(tmp_path / first / second, {"steps": 1}, remedy="go")


def test_a_folder_is_used_again_with_the_same_settings_only(tmp_path):
    path = tmp_path / "settings.json"
    check_settings(path, {"steps": 1}, remedy="go")
    write_json(path, {"sizes": (1, 2), "steps": 1})
    check_settings(path, {"sizes": (1, 2), "steps": 2}, remedy="go", may_change=("steps",))
    check_settings(path, {"sizes": (1, 2), "steps": 1, "seed": 3}, remedy="go", defaults={"seed": 3})
    with pytest.raises(UserError, match=r" was made with other settings \(seed was absent, now 3; sizes .*\): go$"):
        check_settings(path, {"sizes": (1, 3), "steps": 1, "seed": 3}, remedy="go")
    assert json.loads(path.read_text()) == {"sizes": [1, 2], "steps": 1}


def test_settings_that_are_no_json_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is not JSON .*: go$"):
        check_settings(tmp_path / "settings.json", {}, remedy="go")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "in", "Not a directory")):
        with pytest.raises(UserError, match=rf"cannot write in {folder} \({reason}\): give a folder"), locked(folder):
            pass


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(InUse, match="in use by another run"), locked(tmp_path, wait=0):
        pass
    assert InUse("").status == 1 and UserError("").status == 2
    with locked(tmp_path):
        pass


def test_a_folder_is_waited_for(tmp_path):
    held, ended = contextlib.ExitStack(), []
    held.enter_context(locked(tmp_path))
    held.callback(ended.append, True)
    threading.Timer(0.3, held.close).start()
    with locked(tmp_path, wait=60):
        assert ended


def test_a_file_system_without_locks_is_not_a_folder_in_use(tmp_path, monkeypatch):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("alignment_gap.folders.fcntl.flock", refuse)
    line = rf"{tmp_path} cannot be locked \(No locks available\): give a folder"
    with pytest.raises(UserError, match=line) as error, locked(tmp_path):
        pass
    assert not isinstance(error.value, InUse)


def test_a_path_with_a_null_character_is_refused():
    with pytest.raises(UserError, match=r"^'a\\x00b' cannot be a path, because it has a null character: remove it$"):
        at("a\0b")
