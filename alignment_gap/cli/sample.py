"""Sample responses of a policy to prompts from a dataset, a file or the keyboard.

alignment-gap sample --run=runs/online --prompts=prepared/validation --limit=3
alignment-gap sample --run=runs/online --samples=4 --temperature=0.7
"""

from __future__ import annotations

from absl import flags

from alignment_gap.cli.flags import define_config, define_shared, parse, read_config, start_jax

SHORT = {"sampler.": ""}


def main(arguments: list[str]) -> None:
    """Prints the responses; raises UserError if a flag or a setting is invalid."""
    from alignment_gap.jobs.sample import SampleConfig, sample_texts
    from alignment_gap.sharding import is_first_process

    def define(values: flags.FlagValues) -> None:
        define_config(values, SampleConfig, SHORT)
        define_shared(values)

    parsed = parse(arguments, define, __doc__)
    if parsed is None:
        return
    values, _ = parsed
    config = read_config(values, SampleConfig, SHORT)
    start_jax(values)
    for text in sample_texts(config):
        if is_first_process():
            print(text, flush=True)
