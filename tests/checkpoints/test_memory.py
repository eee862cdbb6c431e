"""Peak memory of an import and of an export, each in a process of its own."""

import subprocess
import sys

import numpy as np
import pytest

from alignment_gap.checkpoints import Network, write_checkpoint
from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.tensors import Tensor
from alignment_gap.models import T5Config

# 24 layers of about 4.7 MiB, two embeddings of 32 MiB: 300 MiB in all, which is far above what the limits allow.
CONFIG = T5Config(
    vocabulary_size=32768,
    width=256,
    encoder_layers=24,
    decoder_layers=24,
    heads=4,
    head_size=64,
    mlp_width=1024,
)
MIB = 2**20
PROGRAM = """
import sys
from pathlib import Path
from alignment_gap.checkpoints import formats
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
import alignment_gap.checkpoints.t5x, alignment_gap.checkpoints.t5x_legacy, alignment_gap.checkpoints.t5x_file
formats.model_shapes(formats.Network().model)
before = peak()
eval(sys.argv[1])
print(peak() - before)
"""


def growth(call):
    """Bytes by which the process's largest memory grows in a call."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, call], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of random numbers, which no compression makes small."""
    folder = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(0)

    def tensor(shape, stacked):
        part = shape[1:] if stacked else shape
        return Tensor(shape, "float32", lambda layer: rng.random(part, np.float32), stacked)

    shapes = model_shapes(CONFIG)
    tensors = {name: tensor(shape, "layers" in name) for name, shape in shapes.items()}
    write_checkpoint(folder / "run", 0, Network(model=CONFIG), tensors)
    return folder


@pytest.mark.parametrize("name", ["t5x-file", "t5x-legacy"])
def test_memory_does_not_hold_the_whole(name, run):
    total = 4 * sum(int(np.prod(shape)) for shape in model_shapes(CONFIG).values())
    out, back = run / name, run / f"back-{name}"
    exported = growth(f"formats.export_checkpoint(Path({str(run / 'run')!r}), Path({str(out)!r}), {name!r})")
    imported = growth(f"formats.import_checkpoint(Path({str(out)!r}), Path({str(back)!r}))")
    # A few tensors and what the libraries take for themselves; the whole at once would be 1, and more with its copies.
    assert exported < 0.8 * total
    assert imported < 0.8 * total
