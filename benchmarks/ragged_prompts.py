"""What a decoding kernel that skips the padding of prompts could save at most, beside batches in buckets.

    python benchmarks/ragged_prompts.py --dataset=runs/prepared/train

For each token, the sampler reads the keys and values of all prompt slots of a batch, those of padding too. A kernel
that knows the lengths would read each prompt in blocks of 128 slots, up to its end. The dataset's prompts are shuffled
and cut into batches as a job does it, in buckets as a job chooses them. `slots` is how many slots of a prompt are read
on average, and `of the kernel` how many the kernel would read. `token` is the time of a token in ms, if prompts that
fill `--longest` slots take `--reading` ms and all else takes `--rest` ms. `saved` is the share of this time that the
kernel would save. The defaults are those of T5 XXL on a v5e-256, with 512 prompts of 1024 slots and two responses of
128 tokens: 2.4 ms by long_responses.py, of which the prompts take 1.0 by hand.
"""

from __future__ import annotations

import argparse

import numpy as np

from alignment_gap.data.records import Dataset, lengths_of, open_dataset
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig
from alignment_gap.jobs.reading import open_reading
from alignment_gap.sharding import MeshConfig, make_mesh

BLOCK = 128


def slots_read(dataset: Dataset, buckets: int, batch: int, *, prompts_only: bool) -> tuple[float, float]:
    """The mean number of a prompt's slots over one epoch of batches, and of those that the kernel would read."""
    config = DatasetConfig(str(dataset.folder), batch_size=batch, buckets=buckets)
    source = open_reading(config, "prompts", prompts_only=prompts_only).batches(make_mesh(MeshConfig()), seed=0)
    lengths = lengths_of(dataset)[:, 0]
    numbers = [source.numbers(step) for step in range(len(lengths) // batch)]
    slots = np.repeat([source.shape(each)[0] for each in numbers], batch)
    ends = -(-lengths[np.concatenate(numbers)] // BLOCK) * BLOCK
    return float(slots.mean()), float(np.minimum(ends, slots).mean())


def main() -> None:
    """Prints a row for each number of buckets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a prepared dataset")
    parser.add_argument("--batch", type=int, default=512, help="prompts")
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--pairs", action="store_true", help="responses choose the buckets too, as in offline jobs")
    parser.add_argument("--longest", type=int, default=1024, help="slots of the prompts that take --reading ms")
    parser.add_argument("--reading", type=float, default=1.0, help="ms a token for the prompts' keys and values")
    parser.add_argument("--rest", type=float, default=1.4, help="ms a token for all else")
    options = parser.parse_args()
    try:
        dataset = open_dataset(options.dataset)
    except UserError as error:
        parser.error(str(error))
    lengths = lengths_of(dataset)[:, 0]
    print(f"{len(lengths):,} prompts: {lengths.mean():.0f} tokens on average, {lengths.max()} at most\n")
    columns = ("buckets", "slots", "of the kernel", "token", "saved")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for buckets in options.buckets:
        slots, ragged = slots_read(dataset, buckets, options.batch, prompts_only=not options.pairs)
        token, better = (options.rest + options.reading * each / options.longest for each in (slots, ragged))
        print(f"| {buckets} | {slots:.0f} | {ragged:.0f} | {token:.2f} | {1 - better / token:.1%} |")


if __name__ == "__main__":
    main()
