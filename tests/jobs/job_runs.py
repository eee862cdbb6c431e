"""Jobs of the smallest size: functions that run them, stop them half way, and compare them bit for bit."""

import contextlib
import dataclasses
import json

import jax.numpy as jnp
import numpy as np

from alignment_gap.checkpoints.layout import open_store
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.train import TRAIN
from alignment_gap.models import T5Config
from alignment_gap.training.monitor import is_of_the_clock

MODEL = T5Config(vocabulary_size=136, width=16, encoder_layers=1, decoder_layers=1, heads=2, head_size=8, mlp_width=16)


def shifted_hinge(chosen_logps, rejected_logps, *, shift=1.0, kind="a"):
    """A loss of the tests; jobs name it as job_runs:shifted_hinge."""
    del kind
    return jnp.maximum(0.0, shift - (chosen_logps - rejected_logps))


class Stopped(KeyboardInterrupt):
    """Replaces a kill between two steps."""


class Bar:
    """A progress bar that records its updates, and stops the job after a number of them."""

    def __init__(self, stop_at=None):
        self.updates, self.lines, self.stop_at = [], [], stop_at

    def __call__(self, total, title, unit):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count):
        self.updates.append(count)
        if self.stop_at is not None and sum(self.updates) > self.stop_at:
            raise Stopped

    def write(self, line):
        self.lines.append(line)

    def set_postfix(self, **values):
        pass

    def unpause(self):
        pass


def changed(config, **settings):
    """The job with some other settings of its online source."""
    return dataclasses.replace(config, source=dataclasses.replace(config.source, **settings))


def run_job(config, folder, bar=None):
    """Trains, and returns the folder."""
    make(TRAIN, config, folder, bar or Bar())
    return folder


def run_and_stop(config, folder, after):
    """Trains, and stops in the step after `after` steps."""
    with contextlib.suppress(Stopped):
        make(TRAIN, config, folder, Bar(after))
        raise AssertionError("the job was not stopped")


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not is_of_the_clock(name)} for line in lines]


def steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def arrays(folder, step=None):
    """All arrays of a checkpoint, by default the last one, by store and name."""
    path = folder / "checkpoints" / str(steps(folder)[-1] if step is None else step)
    stores = [store for store in ("params", "optimizer", "copies") if (path / store).exists()]
    return {f"{s}.{name}": tensor.read(None) for s in stores for name, tensor in open_store(path / s).items()}


def assert_equal_checkpoints(first, second, step=None):
    ours, theirs = arrays(first, step), arrays(second, step)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def assert_equal_runs(first, second):
    assert steps(first) == steps(second)
    assert metrics(first) == metrics(second)
    assert_equal_checkpoints(first, second)


def misread(logps):
    """A loss with a wrong `reads`."""
    return -logps[:, 0]


misread.reads = ("everything",)
