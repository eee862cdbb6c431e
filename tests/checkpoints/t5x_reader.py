"""Runs where T5X is installed: T5X reads our checkpoints, computes logits, and writes the checkpoints itself.

Usage: python t5x_reader.py FOLDER. FOLDER has batch.npz, sizes.json and our checkpoints t5x, t5x-legacy and t5x-file.
The script adds logits-FORMAT.npy for each, and T5X's own checkpoints in `by-t5x` and `by-t5x-legacy`.
"""

import functools
import json
import os
import pathlib
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

import jax
import numpy as np
from t5x import checkpoints, partitioning, train_state
from t5x.examples.t5 import network


def main(folder):
    sizes = json.loads((folder / "sizes.json").read_text())
    module = network.Transformer(network.T5Config(**sizes, mlp_activations=("gelu", "linear"), dropout_rate=0.0))
    batch = np.load(folder / "batch.npz")
    tokens = (batch["prompts"], batch["inputs"], batch["targets"])
    variables = jax.eval_shape(functools.partial(module.init, enable_dropout=False), jax.random.key(0), *tokens)
    state = train_state.InferenceState.create(variables)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)

    def interface(name):
        (folder / name).mkdir(exist_ok=True)
        return checkpoints.OrbaxCheckpointManagerInterface(str(folder / name), state, partitioner)

    restored = interface("t5x").restore(path=str(folder / "t5x" / "checkpoint_0"))
    found = {
        "t5x": restored.params,
        "t5x-legacy": checkpoints.load_t5x_checkpoint(str(folder / "t5x-legacy"), 0)["target"],
        "t5x-file": checkpoints.load_t5x_checkpoint(str(folder / "t5x-file"))["target"],
    }
    for name, params in found.items():
        logits = module.apply({"params": params}, *tokens, enable_dropout=False)
        np.save(folder / f"logits-{name}.npy", np.asarray(logits))
    manager = interface("by-t5x")
    manager.save(restored)
    manager.wait_until_finished()
    (folder / "by-t5x-legacy").mkdir()
    checkpoints.Checkpointer(state, partitioner, str(folder / "by-t5x-legacy")).save(restored)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
