"""Conversations and preference records give the texts that TRL and transformers give."""

import dataclasses
import datetime

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template, is_conversational, maybe_extract_prompt

from alignment_gap.data.text.chat import Template, split_answers
from alignment_gap.data.text.forms import Parsing, parse_own
from alignment_gap.data.text.pair import Fields, TextPair
from alignment_gap.data.text.trl import roles_of

TEMPLATES = {
    "gemma": (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}\n"
        "    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama": (
        "{%- if tools is not none %}{{ tools | tojson }}{%- endif %}\n"
        "{%- set first = namespace(found=false) %}\n"
        "{%- for message in messages %}\n"
        "    {%- if loop.first and not first.found %}{{- bos_token }}{%- endif %}\n"
        "    {%- if message.content is string and not message.content %}{% continue %}{% endif %}\n"
        "    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}\n"
        "    {{- message.content.strip() ~ eos_token }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
    ),
}
# With this template the text of a prompt is not a prefix of the whole text, so no answer can be cut out.
HELPERS = "{{ messages | tojson }}{{ strftime_now('%Y') }}"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS = [
    [{"role": "user", "content": "What <b>colour</b> is the sky?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "é\n\n日本"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}, {"role": "user", "content": " c"}],
]


def read(record: dict, template: Template) -> TextPair:
    """The pair of the first record of a source."""
    return parse_own(record, Parsing(roles_of(Fields(record)), template=template))


def both_of(source: str) -> tuple[Template, PreTrainedTokenizerFast]:
    """One template, in our class and in transformers' tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=source, **TOKENS)
    return Template(source, tuple(TOKENS.items())), theirs


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request):
    return both_of(TEMPLATES[request.param])


@pytest.mark.parametrize("chat", CHATS)
def test_a_templates_helpers_write_what_transformers_do(chat):
    ours, theirs = both_of(HELPERS)
    ours = dataclasses.replace(ours, date=datetime.date.today().isoformat())  # transformers takes the day of the work.
    assert ours.render(chat, ask=True) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("ask", [False, True])
def test_a_conversation_is_rendered_as_transformers_renders_it(both, chat, ask):
    ours, theirs = both
    assert ours.render(chat, ask=ask) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)


@pytest.mark.parametrize("chat", CHATS)
def test_answers_are_cut_out_as_trl_does(both, chat):
    ours, theirs = both
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("It is blue.", " It is green. "))
    row = apply_chat_template({"prompt": chat, "chosen": chosen, "rejected": rejected}, theirs)
    assert split_answers(ours, chat, [chosen, rejected]) == (row["prompt"], (row["chosen"], row["rejected"]))


SKY = [{"role": "user", "content": "What color is the sky?"}]
BLUE, GREEN = ([{"role": "assistant", "content": f"It is {color}."}] for color in ("blue", "green"))
RECORDS = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "Sky: blue", "rejected": "Sky: black and blue"},
    {"chosen": "yes\nno", "rejected": "yes\nor"},
    {"prompt": SKY, "chosen": BLUE, "rejected": GREEN},
    {"chosen": SKY + BLUE, "rejected": SKY + GREEN},
    {"chosen": SKY + BLUE + SKY + BLUE, "rejected": SKY + BLUE + SKY + GREEN},
    {"prompt": "What color is the sky?", "chosen": SKY + BLUE, "rejected": SKY + GREEN},
]


@pytest.mark.parametrize("record", RECORDS)
def test_preference_records_are_read_as_trl_reads_them(both, record):
    ours, theirs = both
    row = maybe_extract_prompt(dict(record))
    if is_conversational(row):
        row = apply_chat_template(row, theirs)
    pair = read(record, ours)
    assert (pair.prompt, *pair.responses) == (row["prompt"], row["chosen"], row["rejected"])


@pytest.mark.parametrize("label", [True, False])
def test_unpaired_records_are_read_as_trl_reads_them(both, label):
    ours, theirs = both
    record = {"prompt": SKY, "completion": BLUE, "label": label}
    row = apply_chat_template(dict(record), theirs)
    pair = read(record, ours)
    assert (pair.prompt, *pair.responses, *pair.scores) == (row["prompt"], row["completion"], float(label))
