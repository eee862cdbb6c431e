"""The tables of docs/coming_from.md name only things of ours that exist."""

import dataclasses
import pathlib
import re

from alignment_gap import losses
from alignment_gap.cli.main import COMMANDS
from alignment_gap.jobs import config as jobs
from alignment_gap.training.guard import GuardConfig

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
MACROS = {name for path in (ROOT / "gin").rglob("*.gin") for name in re.findall(r"%(\w+)", path.read_text())}
# Macros of T5X's own gin files; the table for T5X has them on our side.
OF_T5X = {"TASK_FEATURE_LENGTHS"}
RIGHT = [name for row in re.findall(r"^\| .* \| (.*) \|$", TEXT, re.M) for name in re.findall(r"`([^`]+)`", row)]
CLASSES = {name: each for name, each in vars(jobs).items() if dataclasses.is_dataclass(each)} | {
    "GuardConfig": GuardConfig
}


def test_the_tables_were_read():
    assert len(RIGHT) > 100


def test_macros_are_those_of_the_gin_files():
    named = {name.partition("=")[0] for name in RIGHT if re.match(r"[A-Z][A-Z_]+\b(?!\.)", name)}
    assert {"START", "BETA", "RESPONSE_LENGTH"} <= named <= MACROS | OF_T5X | {"EOS"}


def test_fields_are_those_of_the_settings():
    named = [match for name in RIGHT if (match := re.match(r"(?:--gin\.)?(\w+Config)\.(\w+)", name))]
    assert len(named) > 20
    for match in named:
        assert match[2] in {field.name for field in dataclasses.fields(CLASSES[match[1]])}, match[0]


def test_files_commands_and_losses_are_there():
    for path in re.findall(r"gin/\w+/\w+\.gin", TEXT):
        assert (ROOT / path).is_file(), path
    for command in re.findall(r"alignment-gap (\w+)", TEXT):
        assert command in COMMANDS, command
    for name in re.findall(r"LossConfig\.name=(\w+)", TEXT):
        assert name in losses.names(), name
