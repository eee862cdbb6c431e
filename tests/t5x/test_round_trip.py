"""T5X's own `train.py` takes two steps with a gin file of ours; our job takes the same two; the parameters agree.

Both use plain SGD, so two steps differ only by the gradients. A loss with another factor or divisor would show, which
Adam's division would hide.
"""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
BATCH = 8
# T5X sums in another order: its layers follow one another, ours are scanned; and it has both responses as rows of a
# batch. So gradients differ in the last bits, and each step rounds parameters to float32. The bound is in units of
# float32's spacing at the largest entry of a parameter; the steps move each parameter by at least MOVED units.
ROUNDINGS, MOVED = 4, 400

SGD = f"""
from __gin__ import dynamic_registration
include "gin/t5x/tiny.gin"
from t5x import optimizers
SHUFFLE_TRAIN_EXAMPLES = False
BATCH_SIZE = {BATCH}
OPTIMIZER = @optimizers.sgd()
optimizers.sgd.learning_rate = %RATE
"""

# A loss with a reference, one in microbatches, and one without a reference, whose means over tokens are small. Each
# case has the loss, its settings, T5X's microbatches, and the learning rate.
CASES = {
    "ipo": ("ipo", {"beta": 0.1}, 1, 1e-3),
    "dpo in microbatches": ("dpo", {"beta": 0.5}, 2, 1e-2),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.5}, 1, 1e-1),
}


def run(*words):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def alignment_gap(*words):
    run("-c", "from alignment_gap.cli.main import main; main()", *words)


def t5x_train(t5x, folder, pairs, **settings):
    """Runs T5X's main with gin bindings."""
    (folder / "sgd.gin").write_text(SGD)
    bindings = {"DATASET": str(pairs), "MODEL_DIR": str(folder / "t5x"), **settings}
    script = pathlib.Path(t5x.__path__[0]) / "train.py"
    flags = [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    run(script, f"--gin_search_paths={folder},{ROOT}", "--gin_file=sgd.gin", *flags)


def params_of(folder):
    from alignment_gap.sharding import MeshConfig, make_mesh
    from alignment_gap.training import load_policy

    _, params = load_policy(str(folder), make_mesh(MeshConfig()))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def start(t5x, pairs, tmp_path_factory):
    """The folder with T5X's first checkpoint, and the same checkpoint as a run of ours with stored log-probs."""
    folder = tmp_path_factory.mktemp("start")
    # T5X writes the checkpoint only if it takes a step.
    t5x_train(t5x, folder, pairs, TRAIN_STEPS=1, LOSS="simpo", LOSS_SETTINGS={}, RATE=1e-3)
    alignment_gap("checkpoint", "import", f"--from={folder / 't5x' / 'checkpoint_0'}", f"--output={folder / 'ours'}")
    scored = f"--dataset={pairs}", f"--checkpoint={folder / 'ours'}", f"--output={folder / 'scored'}"
    alignment_gap("data", "reference", *scored)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_steps_of_t5x_are_two_of_ours(case, t5x, start, pairs, tmp_path):
    loss, settings, microbatches, rate = CASES[case]
    t5x_train(
        t5x,
        tmp_path,
        pairs,
        TRAIN_STEPS=2,
        INITIAL_CHECKPOINT_PATH=str(start / "t5x" / "checkpoint_0"),
        LOSS=loss,
        LOSS_SETTINGS=settings,
        RATE=rate,
        **{"trainer.Trainer.num_microbatches": microbatches},
    )
    alignment_gap("checkpoint", "import", f"--from={tmp_path / 't5x'}", f"--output={tmp_path / 'theirs'}")
    alignment_gap(
        "train",
        f"--gin_file={ROOT / 'gin/runs/offline_ipo.gin'}",
        *(
            f"--gin.{name}={value}"
            for name, value in {
                "DATASET": pairs,
                "START": start / "ours",
                "LossConfig.name": loss,
                "LossConfig.settings": settings,
                "OPTIMIZER": "sgd",
                "LEARNING_RATE": rate,
                "OptimizerConfig.clip_norm": None,
                "BATCH_SIZE": BATCH,
                "DatasetConfig.order": "recorded",
                "TRAIN_STEPS": 2,
            }.items()
        ),
        f"--workdir={tmp_path / 'ours'}",
    )
    before, ours, theirs = map(params_of, (start / "ours", tmp_path / "ours", tmp_path / "theirs"))
    assert before.keys() == ours.keys() == theirs.keys()
    for name, leaf in before.items():
        spacing = np.spacing(np.abs(leaf).max())
        assert np.abs(ours[name] - leaf).max() >= MOVED * spacing, name
        assert np.abs(theirs[name] - ours[name]).max() <= ROUNDINGS * spacing, name
