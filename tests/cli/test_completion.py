"""Shells complete commands, flags and values with our scripts; every command's help has defaults and an example.

The tests read the flags of a command from its definitions.
"""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from absl import flags

from alignment_gap.cli import completion
from alignment_gap.cli.data import SUBCOMMANDS
from alignment_gap.cli.main import COMMANDS, main

INIT = flags.FlagValues.__init__
OF_ABSL = {"flagfile", "undefok"}
# Commands that take no further word.
LEAVES = [
    *(name for name in COMMANDS if name not in ("data", "checkpoint", "completion")),
    *(f"data {word}" for word in SUBCOMMANDS),
    *(f"checkpoint {word}" for word in ("import", "export", "push", "show")),
    *(f"completion {word}" for word in ("bash", "zsh", "fish")),
]


@pytest.fixture(scope="module")
def places():
    return completion.places()


def shown(monkeypatch, *words):
    """The output of a command, and the flags that it defines."""
    monkeypatch.setattr(sys, "argv", ["alignment-gap", *words])
    defined, said = [], io.StringIO()

    def init(self):
        INIT(self)
        defined.append(self)

    with monkeypatch.context() as patch, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        patch.setattr(flags.FlagValues, "__init__", init)
        main()
    assert ended.value.code == 0
    return said.getvalue(), defined[-1] if defined else flags.FlagValues()


@pytest.mark.parametrize("words", LEAVES)
def test_help_has_an_example_that_parses_and_every_default(words, monkeypatch):
    text, values = shown(monkeypatch, *words.split(), "--help")
    sections = re.split(r"^ *--(?:\[no\])?([\w.]+): ", text, flags=re.MULTILINE)
    about = {name: " ".join(section.split()) for name, section in zip(sections[1::2], sections[2::2], strict=True)}
    assert {*about} - OF_ABSL == {*values}
    for name in values:
        assert not about[name].startswith("(no help available)"), name
        if values[name].default is not None:
            assert f"(default: {values[name].default_as_str})" in about[name]
    lines = text.replace("\\\n", " ").splitlines()
    examples = [shlex.split(line) for line in lines if line.startswith(f"alignment-gap {words}")]
    assert examples
    known = {*values} | {f"no{name}" for name in values}
    # After the flags of launch come the flags of the command that it launches.
    for example in examples if words != "launch" else []:
        given = [word.removeprefix("--").partition("=")[0] for word in example if word.startswith("--")]
        assert all(name in known or name.startswith(("config.", "gin.")) for name in given), example


def test_places_are_the_commands_and_what_launch_takes(places):
    assert {*places[""].words} == {*COMMANDS}
    assert {*LEAVES} < {*places}
    assert {*places["launch"].words} == {"train", "evaluate", "data", "study"}
    assert places["launch data prepare"] == places["data prepare"]


@pytest.mark.parametrize("words", LEAVES)
def test_a_place_has_the_flags_that_its_command_defines(words, places, monkeypatch):
    _, values = shown(monkeypatch, *words.split(), "--help")
    assert {flag.name for flag in places[words].flags} == {*values} - OF_ABSL | {"help"}
    for flag in places[words].flags:
        assert flag.has_value != (flag.name == "help" or isinstance(values[flag.name], flags.BooleanFlag))


@pytest.fixture(scope="module")
def complete(places):
    """What bash offers for the last of these words."""
    script = completion.bash_script(places)

    def offered(*words):
        line = (
            f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; _alignment_gap; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "--norc", "-u", "-c", f"{script}\n{line}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["st"], ["study"]),
        (["data", "p"], ["prepare"]),
        (["study", "--work"], ["--workdir="]),
        (["study", "--list", "--u"], ["--update"]),
        (["data", "prepare", "--posts.p"], ["--posts.pairs="]),
        (["launch", "--engine", "=", "slurm", "da"], ["data"]),
        (["launch", "--engine", "=", "slurm", "data", "show", "--ex"], ["--examples="]),
        # Bash splits words at the equals sign.
        (["data", "vocabulary", "--model", "="], ["unigram", "bpe"]),
        (["data", "vocabulary", "--model", "=", "b"], ["bpe"]),
        # We offer nothing here; readline completes files.
        (["data", "vocabulary", "--output", "=", "o"], []),
        (["data", "show", "runs/"], []),
        (["study", "--none"], []),
    ],
)
def test_bash(words, offered, complete):
    assert complete("alignment-gap", *words) == offered


def test_bash_offers_all_commands(complete):
    assert complete("alignment-gap", "") == [*COMMANDS]
    assert complete("alignment-gap", "completion", "") == ["bash", "zsh", "fish"]


def script_of(shell, places, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / f"script.{shell}"
    path.write_text(getattr(completion, f"{shell}_script")(places))
    return path


def test_fish(places, tmp_path, monkeypatch):
    path = script_of("fish", places, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def offered(line):
        command = ["fish", "--no-config", "-c", f"source {path}; complete -C {shlex.quote(line)}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stderr == ""
        return [each.partition("\t")[0] for each in done.stdout.splitlines()]

    (tmp_path / "own.model").touch()
    assert offered("alignment-gap st") == ["study"]
    assert offered("alignment-gap data p") == ["prepare"]
    assert offered("alignment-gap launch data prepare --posts.pa") == ["--posts.pairs"]
    assert offered("alignment-gap data vocabulary --model=b") == ["--model=bpe"]
    assert offered("alignment-gap data vocabulary --output=ow") == ["--output=own.model"]


def test_zsh(places, tmp_path):
    """Tests only our part of the script: the arguments of zsh's _describe and _arguments."""
    path = script_of("zsh", places, tmp_path)

    def handed(*words):
        program = (
            f"compdef() {{ }}; source {path}; _describe() {{ print -lr -- $subcommands }}; "
            "_arguments() { print -lr -- $@ }; "
            f"words=(alignment-gap {' '.join(map(shlex.quote, words))}); CURRENT={len(words) + 1}; _alignment_gap"
        )
        done = subprocess.run(["zsh", "-f", "-c", program], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.splitlines()

    assert handed("") == [f"{name}:{about}" for name, about in COMMANDS.items()]
    assert handed("data", "vocabulary", "--m")[-1] == "*:file:_files"
    assert "--model=[<unigram|bpe>\\: Kind of SentencePiece model.]:value:(unigram bpe)" in handed(
        "data", "vocabulary", ""
    )
    assert "--list[Print the jobs without running them.]" in handed("launch", "--engine=slurm", "study", "--")
    assert [line.partition(":")[0] for line in handed("launch", "")] == ["train", "evaluate", "data", "study"]
