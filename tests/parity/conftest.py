"""Runs only where TRL is installed (`make parity`); elsewhere nothing here is collected."""

import importlib.util
import pathlib
import sys

WITH_TRL = importlib.util.find_spec("trl") is not None

collect_ignore_glob = [] if WITH_TRL else ["test_*.py"]
# Makes trl_harness (here) and byte_tokenizer (tests/data) importable.
sys.path += [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1] / "data")]


def pytest_terminal_summary(terminalreporter):
    """Prints the table of docs/losses.md: one row for every comparison that passed."""
    if "trl_harness" not in sys.modules:
        return
    from trl_harness import ROWS

    terminalreporter.write_line("")
    terminalreporter.write_line("| TRL | its settings | here | relative difference: value | gradient |")
    terminalreporter.write_line("| --- | --- | --- | ---: | ---: |")
    for theirs, settings, ours, value, gradient in ROWS:
        terminalreporter.write_line(f"| {theirs} | {settings} | {ours} | {value:.0e} | {gradient:.0e} |")
