"""The dataset for judges, batches of it, and checkpoints of preference models."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Makes judges importable as "own_judges:brevity", however pytest was started.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from built_in import write_posts
from tiny_models import random_params

from alignment_gap.checkpoints import Network
from alignment_gap.data.batches import collate
from alignment_gap.data.records import open_dataset
from alignment_gap.data.text import extra_id, load_vocabulary
from alignment_gap.models import DecoderConfig
from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh
from alignment_gap.training import Checkpoints, TrainState

MODEL = DecoderConfig(vocabulary_size=136, width=16, layers=1, heads=2, kv_heads=1, head_size=4, mlp_width=16)


@pytest.fixture(scope="session")
def vocabulary():
    return load_vocabulary("posts")


@pytest.fixture(scope="session")
def posts(tmp_path_factory):
    """A dataset of 24 pairs of the built-in task."""
    folder = tmp_path_factory.mktemp("judges") / "posts"
    write_posts(folder, 24)
    return open_dataset(folder)


@pytest.fixture(scope="session")
def alone():
    """A mesh with one of the eight devices."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def texts_on(posts):
    """The inputs of a judge on a mesh: the first 8 prompts, each with `samples` responses."""

    def make(mesh, samples=2):
        examples = [
            dataclasses.replace(
                posts[i],
                responses=tuple(posts[(i + k) % 24].responses[k % 2] for k in range(samples)),
                scores=np.zeros(samples, np.float32),
            )
            for i in range(8)
        ]
        batch = collate(examples, posts.card.max_prompt_length, posts.card.max_response_length)
        arrays = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
        return tuple(jax.device_put(array, batch_sharding(mesh)) for array in arrays)

    return make


@pytest.fixture(scope="session")
def network_of(vocabulary):
    """The network of a policy or of a preference model; it answers in the posts' vocabulary."""

    def make(kind, digest=vocabulary.digest):
        markers = () if kind == "policy" else tuple(extra_id(vocabulary, i) for i in range(5))
        return Network(kind, MODEL, markers, "posts", digest)

    return make


@pytest.fixture(scope="session")
def write_run(network_of):
    """Writes the folder of a run of a given kind, with random parameters at each step."""

    def write(folder, kind, steps=(2,), **settings):
        network = network_of(kind, **settings)
        with Checkpoints(folder / "checkpoints", network) as checkpoints:
            for step in steps:
                checkpoints.save(TrainState(jnp.int32(step), random_params(network.policy(), step), {}))
        return str(folder)

    return write


@pytest.fixture(scope="session")
def runs(write_run, tmp_path_factory):
    """The folder of a run of each kind; the pairwise run has two checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    steps = {"policy": (2,), "pairwise": (2, 4), "bradley_terry": (2,)}
    return {kind: write_run(folder / kind, kind, steps=each) for kind, each in steps.items()}
