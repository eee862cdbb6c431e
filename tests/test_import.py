"""What an import costs."""

import subprocess
import sys

import pytest

HEAVY = ("tensorflow", "seqio", "matplotlib", "altair", "grain", "orbax", "orbax.checkpoint", "scipy", "pandas")


@pytest.mark.parametrize("statement", ["import alignment_gap", "from alignment_gap import losses"])
def test_the_import_is_light(statement):
    program = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
