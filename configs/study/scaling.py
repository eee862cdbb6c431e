"""The study on the built-in task over policies of several sizes, with one golden policy and one pair of judges.

alignment-gap study --config=configs/study/scaling.py --config.sizes="('palm_10m', 'palm_30m')" --workdir=runs/scaling
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


def get_config() -> ConfigDict:
    config = tiny.get_config().to_dict()
    # Judges and golden policy have the network of the small study, whatever the policy's.
    base = {"model": config["policy"], "start": None}
    policy = to_dict(sizes.get("palm_10m", vocabulary_size=load_vocabulary("posts").size))
    return ConfigDict(
        config | {"name": "scaling", "sizes": ("palm_10m", "palm_30m", "palm_100m"), "policy": policy, "base": base}
    )
