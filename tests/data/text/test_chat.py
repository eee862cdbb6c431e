import dataclasses
import json

import pytest

from alignment_gap.data.text import TextSourceConfig, open_source
from alignment_gap.data.text.chat import Template, load_template, split_answers
from alignment_gap.data.text.pair import BadPair
from alignment_gap.errors import UserError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi "}]
ANSWERS = [[{"role": "assistant", "content": answer}] for answer in ("hello", " bye")]
# As Gemma and ChatML write conversations.
GEMMA = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}\n"
    "    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}\n"
    "    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_plain_form_is_that_of_hh():
    prompt, answers = split_answers(Template(), CHAT, ANSWERS)
    assert prompt == "Be brief.\n\nHuman: hi\n\nAssistant:"
    assert answers == ("hello", "bye")


def test_a_template_writes_the_prompt_and_what_follows_it():
    template = Template(GEMMA, (("bos_token", "<bos>"),))
    prompt, answers = split_answers(template, CHAT[1:], ANSWERS)
    assert prompt == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    assert answers == ("hello<end_of_turn>\n", "bye<end_of_turn>\n")


def test_jinjas_blocks_are_trimmed_and_the_generation_mark_writes_nothing():
    prompt, answers = split_answers(Template(CHATML), CHAT, ANSWERS)
    assert (
        prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\n"
    )
    assert answers == ("hello<|im_end|>\n", " bye<|im_end|>\n")


def test_helpers_of_templates_are_there():
    source = "{{ messages | tojson }}{% for m in messages %}{% break %}{% endfor %}{{ strftime_now('%%') }}"
    messages = [{"role": "user", "content": "é<"}]
    assert Template(source).render(messages, ask=True) == json.dumps(messages, ensure_ascii=False) + "%"


def test_today_is_a_fixed_day():
    source = "{% macro day() %}{{ strftime_now('%d %b %Y %H:%M') }}{% endmacro %}{{ day() }}"
    source += "{{ strftime_now is defined }}"
    assert Template(source).render(CHAT, ask=True) == "26 Jul 2024 00:00True"
    assert Template(source, date="2026-12-01").render(CHAT, ask=True) == "01 Dec 2026 00:00True"


@pytest.mark.parametrize("date", ["today", "", "2026-13-01", "2026-2-1", "20260201", "2026-02-01T12:00"])
def test_a_date_that_is_no_day_is_refused(date):
    with pytest.raises(
        UserError, match=rf"^template_date is '{date}': give a day as YEAR-MONTH-DAY, such as 2024-07-2"
    ):
        TextSourceConfig("x", template_date=date)


def test_a_template_reaches_nothing_of_python():
    with pytest.raises(BadPair, match="refused by the chat template"):
        Template("{{ messages.__class__.__mro__ }}").render(CHAT, ask=True)


def test_a_conversation_that_a_template_refuses_is_a_bad_pair():
    with pytest.raises(BadPair, match=r"refused by the chat template \(no system role\)"):
        split_answers(Template(GEMMA), CHAT, ANSWERS)
    with pytest.raises(BadPair, match="template without a common prompt"):
        split_answers(Template("{{ messages | length }}"), CHAT, ANSWERS)


def test_a_folder_brings_its_template_and_the_texts_of_its_special_tokens(tmp_path):
    config = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>", "chat_template": GEMMA}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = Template(GEMMA, (("bos_token", "<bos>"), ("eos_token", "<eos>")))
    assert load_template(str(tmp_path)) == expected
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": GEMMA}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert load_template(str(tmp_path)) == expected
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_template(str(tmp_path)).source == CHATML
    assert load_template(str(tmp_path / "chat_template.jinja")) == Template(CHATML)
    assert load_template("plain") == Template()


def test_a_template_that_is_missing_or_no_jinja_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no chat template: give a jinja file, or \"plain\""):
        load_template(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot read the template .*none\.jinja"):
        load_template(str(tmp_path / "none.jinja"))
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match=r"the chat template is not jinja \(line 1: .*\): fix it"):
        load_template(str(tmp_path / "bad.jinja"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        load_template(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json holds no JSON object"):
        load_template(str(tmp_path))


def test_conversations_of_a_source_are_written_by_its_template(write, tmp_path, battle):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    location = write(tmp_path, "jsonl", [battle("1 + 1?", "two", "three", "model_b")])
    (pair,) = open_source(TextSourceConfig(location, template=str(tmp_path / "chatml.jinja"))).read()
    assert pair.prompt == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert pair.responses == ("two<|im_end|>\n", "three<|im_end|>\n") and pair.scores == (0.0, 1.0)


def test_by_default_conversations_are_written_by_the_vocabulary_s_own_template(write, tmp_path, battle):
    location = write(tmp_path, "jsonl", [battle("1 + 1?", "two", "three", "model_b")])
    config, folder = TextSourceConfig(location), tmp_path / "tokenizer"
    folder.mkdir()
    for vocabulary in (None, "bytes", str(folder)):
        source = open_source(config, vocabulary)
        assert source.config.template == "plain" and next(source.read()).prompt == "\n\nHuman: 1 + 1?\n\nAssistant:"
    (folder / "chat_template.jinja").write_text(CHATML)
    for vocabulary in (folder, folder / "tokenizer.json"):
        source = open_source(config, str(vocabulary))
        assert source.config.template == str(folder) and source.template == Template(CHATML)
    dated = dataclasses.replace(config, template_date="2026-12-01")
    assert open_source(dated, str(folder)).template == Template(CHATML, date="2026-12-01")
    asked = dataclasses.replace(config, template="plain")
    assert open_source(asked, str(folder)).template == Template()


def test_texts_need_no_template_and_refuse_one(write, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    location = write(tmp_path, "jsonl", [{"prompt": "1 + 1?", "chosen": "two", "rejected": "three", "tags": ["x"]}])
    source = open_source(TextSourceConfig(location), str(tmp_path))
    assert source.config.template is None and next(source.read()).prompt == "1 + 1?"
    message = (
        r"template is '.*', but .*:1 holds texts, which are used as they are: write messages .*, or leave template"
    )
    with pytest.raises(UserError, match=message):
        open_source(TextSourceConfig(location, template=str(tmp_path)))
