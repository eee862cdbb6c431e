"""Flags from dataclasses: names, defaults, types and help; and one line for every wrong value."""

import dataclasses
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import pytest
from absl import flags

from alignment_gap import checks
from alignment_gap.cli.flags import define_config, define_shared, parse, read_config, require, run_subcommand
from alignment_gap.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    """Settings of a part.

    Attributes:
      rate: how fast,
        in metres.
      names: of something.
    """

    rate: float = 0.5
    names: tuple[str, ...] | None = None

    def __post_init__(self):
        """Raises UserError if the rate is negative."""
        checks.at_least(self, 0, "rate")


@dataclasses.dataclass(frozen=True)
class Outer:
    """Settings.

    Attributes:
      count: how many.
      fast: whether it is.
      steps: which.
      inner: a part.
      limit: at most; None for all.
      place: where.
      rules: what is where.
    """

    count: int = 3
    fast: bool = False
    steps: tuple[int, ...] = ()
    inner: Inner = Inner()
    limit: int | None = None
    place: str | None = None
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SHORT = {"inner.": "", "place": "where"}


def read(*words):
    values, rest = parse(["command", *words], lambda values: define_config(values, Outer, SHORT), "help")
    assert rest == []
    return read_config(values, Outer, SHORT)


def test_without_flags_it_is_the_default():
    assert read() == Outer()


def test_every_type_of_setting():
    words = ["--count=5", "--fast", "--steps=1,2", "--rate=2", "--names=a,b", "--limit=7", "--where=here"]
    assert read(*words) == Outer(5, True, (1, 2), Inner(2.0, ("a", "b")), 7, "here")
    assert read("--nofast", "--steps=", "--rate=0") == Outer(inner=Inner(0.0))
    assert read("--rules={'mlp': None, 'batch': ('data',)}").rules == {"mlp": None, "batch": ("data",)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cuont=1"], "Unknown command line flag 'cuont'. Did you mean: count"),
        (["--count=many"], "flag --count=many: invalid literal for int"),
        (["--steps=1,x"], "--steps=1,x: give values of type int, separated by commas"),
        (["--rules=mlp:None"], "--rules=mlp:None: give a dict in Python's notation, such as {'mlp': None}"),
        (["--rules=('mlp', None)"], "give a dict"),
        (["--rate=-1"], "--rate is -1.0: it must be at least 0"),
        (["more"], "unexpected argument 'more': flags are written --flag=value"),
    ],
)
def test_what_a_flag_cannot_be_is_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        read(*words)
    assert "\n" not in str(error.value)


def test_help_has_the_docstring_s_lines_and_the_defaults(capsys):
    assert parse(["command", "-h"], lambda values: define_config(values, Outer, SHORT), "about it") is None
    shown = capsys.readouterr().out
    assert shown.startswith("about it\n")
    words = " ".join(shown.split())
    assert "--rate: how fast, in metres. (default: '0.5')" in words and "--[no]fast: whether it is." in words


def test_a_flag_that_has_to_be_given():
    values = flags.FlagValues()
    flags.DEFINE_string("output", None, "Where.", flag_values=values)
    values(["command"])
    with pytest.raises(UserError, match="--output is not set: add --output=VALUE"):
        require(values, "output")
    values(["command", "--output=x"])
    assert require(values, "output") == "x"


def test_processes_come_from_the_environment_where_no_flag_says(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    values, _ = parse(["command", "--process=1"], define_shared, None)
    assert (values.processes, values.process) == (4, 1)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'four' in the environment: set it to a number"):
        parse(["command"], define_shared, None)


def test_sub_commands(capsys):
    ran = []

    def show(arguments):
        """Show a thing.

        alignment-gap data show x
        """
        ran.append(arguments)

    run_subcommand(["alignment-gap data", "show", "x"], {"show": show}, "help")
    assert ran == [["alignment-gap data show", "x"]]
    run_subcommand(["alignment-gap data"], {"show": show}, "about data")
    assert capsys.readouterr().out == "about data\n\nShow a thing.\n\nalignment-gap data show x\n" and len(ran) == 1
    with pytest.raises(UserError, match=r"unknown command data 'shwo': did you mean show\?"):
        run_subcommand(["alignment-gap data", "shwo"], {"show": show}, "help")


def test_flags_as_xml_are_for_programs(capsys):
    assert parse(["command", "--helpxml"], lambda values: define_config(values, Outer, SHORT), "about it") is None
    shown = ElementTree.fromstring(capsys.readouterr().out)
    found = {flag.findtext("name"): flag.findtext("type") for flag in shown.iter("flag")}
    assert (found["count"], found["fast"], found["where"]) == ("int", "bool", "string")
