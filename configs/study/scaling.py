"""The study on the built-in task over policies of several sizes, with one golden policy and one pair of judges.

Two series of sizes, "t5" and "palm", each over a factor of 100 in parameters.

alignment-gap study --config=configs/study/scaling.py:t5 --workdir=runs/scaling_t5
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from alignment_gap.configuration import to_dict
from alignment_gap.data.text import load_vocabulary
from alignment_gap.models import sizes

_spec = importlib.util.spec_from_file_location("tiny", pathlib.Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

LADDERS = {family: tuple(f"{family}_{size}" for size in ("30k", "300k", "3m")) for family in ("t5", "palm")}


def get_config(family: str = "t5") -> ConfigDict:
    if family not in LADDERS:
        raise ValueError(f"the ladder is {family!r}: choose one of {', '.join(LADDERS)}")
    config, ladder = tiny.get_config(), LADDERS[family]
    config.name, config.seeds, config.sizes = f"scaling {family}", 3, ladder
    # Judges and golden policy have the network of the small study, for all sizes of the policy.
    config.base = {"model": config.policy.to_dict()}
    vocabulary_size = load_vocabulary("posts").size
    config.policy = to_dict(sizes.get(ladder[0], vocabulary_size=vocabulary_size, scan_unroll=2))
    config.arms.losses = ("ipo",)
    config.arms.swept = ("offline", "shuffled")
    return config
