"""Peak memory of an import and of an export, each in its own process."""

import subprocess
import sys

import numpy as np
import pytest

from alignment_gap.checkpoints import Network, write_checkpoint
from alignment_gap.checkpoints.formats import model_shapes
from alignment_gap.checkpoints.tensors import Tensor
from alignment_gap.models import T5Config

# Two embeddings of 8 MiB. A layer of the encoder and one of the decoder have 9.5 MiB together.
DEPTHS = (6, 24)
CONFIGS = {
    depth: T5Config(
        vocabulary_size=8192,
        width=256,
        encoder_layers=depth,
        decoder_layers=depth,
        heads=4,
        head_size=64,
        mlp_width=1024,
    )
    for depth in DEPTHS
}
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
    """Bytes by which a call raises the peak memory of a process."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, call], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A shallow and a deep checkpoint of random numbers, which do not compress."""
    folder = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(0)

    def tensor(shape, stacked):
        part = shape[1:] if stacked else shape
        return Tensor(shape, "float32", lambda layer: rng.random(part, np.float32), stacked)

    for depth, config in CONFIGS.items():
        tensors = {name: tensor(shape, "layers" in name) for name, shape in model_shapes(config).items()}
        write_checkpoint(folder / str(depth), 0, Network(model=config), tensors)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5x-file", "t5x-legacy"])
def test_memory_does_not_grow_with_the_depth(name, runs):
    """Both depths include the memory of the libraries.

    A program that holds everything would need all the extra bytes.
    """
    sizes, exports, imports = [], [], []
    for depth in DEPTHS:
        run, out, back = (str(runs / place) for place in (str(depth), f"{name}-{depth}", f"back-{name}-{depth}"))
        sizes.append(4 * sum(int(np.prod(shape)) for shape in model_shapes(CONFIGS[depth]).values()))
        exports.append(growth(f"formats.export_checkpoint(Path({run!r}), Path({out!r}), {name!r})"))
        imports.append(growth(f"formats.import_checkpoint(Path({out!r}), Path({back!r}))"))
    more = sizes[1] - sizes[0]
    assert more > 160 * MIB
    assert exports[1] - exports[0] < more / 4
    assert imports[1] - imports[0] < more / 4
