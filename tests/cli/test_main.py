"""The `alignment-gap` command: its help, its exit statuses, and one line for every mistake of the user."""

import contextlib
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import alignment_gap
from alignment_gap import __version__
from alignment_gap.cli.main import COMMANDS, guarded, main
from alignment_gap.errors import Interrupted, UserError
from alignment_gap.interruption import requested, watching


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["alignment-gap", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2)])
def test_help_names_every_command(words, status, monkeypatch, capsys):
    assert run(monkeypatch, *words) == status
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_what_ends_after_a_failed_save_says_nothing(capsys, monkeypatch):
    """Tensorstore's callbacks cannot raise, so Python prints their errors.

    Other errors of this kind are still printed.
    """
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))

    class Callback:
        def __init__(self, line):
            self.line = line

        def __del__(self):
            raise RuntimeError(self.line)

    def run():
        for line in ("Event loop is closed", "something else"):
            Callback(line)

    assert guarded(run) == 0
    assert told == ["something else"]


def test_an_unknown_command(monkeypatch, capsys):
    assert run(monkeypatch, "trian") == 2
    assert capsys.readouterr().err == "error: unknown command 'trian': did you mean train?\n"


def test_an_error_names_the_page_that_explains_it(capsys):
    def refuse():
        raise UserError("a value", page="jobs.md#train")

    assert guarded(refuse) == 2
    assert capsys.readouterr().err == "error: a value (see docs/jobs.md#train)\n"


def test_the_pages_that_errors_name_have_these_sections():
    package = pathlib.Path(alignment_gap.__file__).parent
    named = {found for path in package.rglob("*.py") for found in re.findall(r'page="([\w.#-]+)"', path.read_text())}
    assert named
    for place in named:
        page, _, section = place.partition("#")
        titles = re.findall(r"^#+ (.+)$", (package.parent / "docs" / page).read_text(), flags=re.MULTILINE)
        assert section in [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles], place


def test_a_path_that_no_file_can_have_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for place, reason in (
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "file" / "in", "Not a directory"),
    ):
        assert guarded(place.mkdir) == 2
        said = capsys.readouterr().err
        assert said == f"error: {str(place)[:120]} cannot be a path here ({reason}): give another one\n"


def test_exit_statuses(capsys):
    def refuse():
        raise UserError("the value, the limit, the remedy")

    def interrupt():
        raise KeyboardInterrupt

    assert guarded(lambda: None) == 0
    assert guarded(refuse) == 2
    assert guarded(interrupt) == 130
    assert capsys.readouterr().err == (
        "error: the value, the limit, the remedy\ninterrupted: the same command continues from here\n"
    )


@contextlib.contextmanager
def handled(number, handler):
    """A signal's handler, whatever a shell's background job or nohup has set: the tests may run in one."""
    before = signal.signal(number, handler)
    yield
    assert signal.getsignal(number) is handler
    signal.signal(number, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_signal_decides_the_exit_status(number, status, capsys):
    """Without a loop that checks for signals the process ends at once.

    With one, the process ends after a step, and prints where it stands.
    """

    def loop():
        with watching():
            signal.raise_signal(number)
            assert requested(3)
            raise Interrupted("saved at step 3 of 5")

    with handled(number, signal.default_int_handler):
        assert guarded(lambda: signal.raise_signal(number)) == status
        assert guarded(loop) == status
    line = "interrupted, saved at step 3 of 5: the same command continues from here\n"
    assert capsys.readouterr().err == "interrupted: the same command continues from here\n" + line


def test_under_nohup_a_closed_terminal_changes_nothing(capsys):
    with handled(signal.SIGHUP, signal.SIG_IGN):
        assert guarded(lambda: signal.raise_signal(signal.SIGHUP)) == 0
    assert capsys.readouterr().err == ""


def test_what_jax_caught_of_several_processes_is_a_scheduler_s():
    def loop():
        raise Interrupted("saved at step 3 of 5")

    assert guarded(loop) == 75


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("options", [[], ["-u"]])
def test_output_that_nobody_reads_to_the_end_is_no_error(lines, options, monkeypatch):
    """Such as `alignment-gap losses | head -1`, whether or not the output fits into a buffer."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    program = (
        "import sys\nfrom alignment_gap.cli.main import guarded\n"
        f"def run():\n    sys.stdin.read()\n    for i in range({lines}): print(i)\n"
        "sys.exit(guarded(run))"
    )
    command, pipe = [sys.executable, *options, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_another_broken_pipe_is_an_error():
    def run():
        raise BrokenPipeError("a socket")

    with pytest.raises(BrokenPipeError, match="a socket"):
        guarded(run)
