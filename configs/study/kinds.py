"""The study on one kind of the built-in task; the kinds take the place of the paper's four tasks.

- easy: the rater hardly errs.
- noisy: the rater errs often.
- biased: the rater likes long responses, but the rubric does not; few writers use the whole length.
- short, long: the responses are short or long.

alignment-gap study --config=configs/study/kinds.py:biased --workdir=runs/biased
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

_spec = importlib.util.spec_from_file_location("tiny", pathlib.Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

KINDS = {
    "easy": {"rater_temperature": 0.04},
    "noisy": {"rater_temperature": 0.5},
    "biased": {"rater_word_bias": 0.08, "response_words": 16},
    "short": {"long_form_chance": 0.0, "response_words": 6, "brief_words": 5, "side_chance": 0.2},
    "long": {"long_form_chance": 1.0, "response_words": 18, "brief_words": 11, "miss_chance": 0.5},
}


def get_config(kind: str = "noisy") -> ConfigDict:
    if kind not in KINDS:
        raise ValueError(f"the kind is {kind!r}: choose one of {', '.join(KINDS)}")
    config = tiny.get_config()
    config.name, config.seeds = f"{kind} posts", 3
    config.task.source.posts.settings.update(KINDS[kind])
    config.arms.losses = ("ipo",)
    config.arms.swept = ("offline", "shuffled")
    return config
