"""The study on 1,000 Reddit posts, each with a person's and a model's summary. GPT chose the better one, not a person.

The posts are too few to learn a language from. SFT starts from the first SFT policy of `hh.py`, as that of its helpful
pairs does, and reads the chosen summaries and the people's summaries of the posts without a choice (`unjudged`).

alignment-gap data prepare --source=posts.jsonl.gz --vocabulary=hh.model --output=runs/tldr_unjudged \
    --prompt_length=512 --response_length=96 --long_prompts=keep_end --validation=0 \
    --fields=prompt=prompt,first=reference,second=model,label=preferred --labels=ours=drop,reference=drop,=1
alignment-gap study --config=configs/study/tldr.py --workdir=runs/tldr --config.task.vocabulary=hh.model \
    --config.task.source.location=posts.jsonl.gz
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

_spec = importlib.util.spec_from_file_location("hh", pathlib.Path(__file__).with_name("hh.py"))
hh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hh)


def get_config() -> ConfigDict:
    config = hh.get_config("helpful")
    config.name = "tldr"
    source, limits = config.task.source, config.task.limits
    source.fields = "prompt=prompt,first=model,second=reference,label=preferred"
    source.labels = "ours=1,reference=0,=drop"
    # A long post keeps its end, with the mark that asks for the summary.
    limits.prompt_length, limits.response_length = 512, 96
    # Every prompt that the policies are compared on is held out: a fifth of the posts is 200 prompts.
    config.task.validation = 0.2
    config.sft.also = ("runs/tldr_unjudged/train",)
    # Three epochs, in smaller batches than the 2,354 helpful pairs have.
    for stage in (config.sft, config.golden, config.proxy):
        stage.batch_size, stage.steps = 32, 75
    config.sft.steps = 150
    return config
