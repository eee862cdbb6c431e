import json

import pytest
from byte_tokenizer import CHATML, make_tokenizer

from alignment_gap.data.text import (
    Dropped,
    Limits,
    TextPair,
    TextSourceConfig,
    encode_pair,
    load_vocabulary,
    open_source,
    prompt_ids,
)
from alignment_gap.data.text.tokenizer_vocabulary import TokenizerVocabulary
from alignment_gap.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoint"


def test_ids_are_those_of_the_library_with_explicit_special_ids(folder):
    theirs = make_tokenizer(folder)
    for path in (folder, folder / "tokenizer.json"):
        ours = load_vocabulary(path)
        assert (ours.pad_id, ours.eos_id, ours.bos_id, ours.unk_id, ours.size) == (0, 1, 2, 3, 4 + 256)
        for text in ("", "hello\n", "日本 é"):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
            assert ours.decode([*ours.encode(text), 1, 70]) == text
    assert ours.decode([2, *ours.encode("a"), 0, 999]) == "<s>a<pad><no_token_999>"
    assert ours.decode([*ours.encode("a"), 1, *ours.encode("b"), 1], past_ends=True) == "a</s>b"
    assert ours.extra_ids == 0


def test_prompts_begin_as_the_tokenizers_own_do(folder):
    make_tokenizer(folder)
    assert load_vocabulary(folder).bos_id == 2
    make_tokenizer(folder, begins=False)
    assert load_vocabulary(folder).bos_id is None


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_prompts_end_as_the_tokenizers_own_do(folder, begins, ends):
    """If the end token is the one that begins prompts, prompts do not end with it."""
    theirs = make_tokenizer(folder, begins=begins, ends=ends)
    assert prompt_ids("hello", load_vocabulary(folder)) == theirs.encode("hello").ids
    assert load_vocabulary(folder).ends_prompts == ends
    if begins:
        make_tokenizer(folder, ends=ends, eos_token="<s>")
        assert not load_vocabulary(folder).ends_prompts


def test_without_a_padding_token_the_end_pads(folder):
    make_tokenizer(folder, pad_token=None)
    vocabulary = load_vocabulary(folder)
    assert vocabulary.pad_id == vocabulary.eos_id == 1


def test_the_special_tokens_map_is_read_and_the_config_wins(folder):
    make_tokenizer(folder, eos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<unk>"}))
    assert load_vocabulary(folder).eos_id == 3
    make_tokenizer(folder)
    assert load_vocabulary(folder).eos_id == 1


def test_t5s_sentinels_are_counted(folder):
    make_tokenizer(folder, tokens=tuple(f"<extra_id_{i}>" for i in reversed(range(5))))
    vocabulary = load_vocabulary(folder)
    assert (vocabulary.extra_ids, vocabulary.size) == (5, 265)
    assert vocabulary.decode([vocabulary.size - 1]) == "<extra_id_0>"


def test_truncation_and_padding_of_the_file_are_not_used(folder):
    tokenizer = make_tokenizer(folder)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_vocabulary(folder).encode("hello")) == 5


def test_the_digest_follows_tokens_and_special_ids(folder):
    make_tokenizer(folder)
    first = load_vocabulary(folder).digest
    assert load_vocabulary(folder).digest == first
    make_tokenizer(folder, pad_token=None)
    second = load_vocabulary(folder).digest
    make_tokenizer(folder, tokens=("<x>",))
    assert len({first, second, load_vocabulary(folder).digest}) == 3


def test_what_is_no_tokenizer_is_one_line(folder):
    make_tokenizer(folder, eos_token=None)
    with pytest.raises(UserError, match=r"has no eos_token: put the checkpoint's special_tokens_map\.json or"):
        load_vocabulary(folder)
    make_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        load_vocabulary(folder)
    for content in (b"", b"{}", b"\xff"):
        (folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer") as error:
            load_vocabulary(folder)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"cannot read the vocabulary .*none\.json"):
        TokenizerVocabulary(folder / "none.json")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no vocabulary: give a SentencePiece"):
        load_vocabulary(folder)


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000])
def test_a_tokenizer_config_that_is_no_object_is_one_line(folder, content):
    make_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json (holds no JSON object|is not JSON .*): fetch the file"
    ):
        load_vocabulary(folder)


def test_a_checkpoints_template_and_tokenizer_make_one_begin_and_one_end(folder, tmp_path):
    tokenizer = make_tokenizer(
        folder, tokens=("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>", chat_template=CHATML
    )
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "a<|im_end|>b"}],
    }
    path = tmp_path / "a.jsonl"
    no = [{"role": "assistant", "content": "no"}]
    path.write_text(json.dumps(row | {"rejected": no}) + "\n" + json.dumps(row))
    good, bad = open_source(TextSourceConfig(str(path), template=str(folder))).read()
    vocabulary, limits = load_vocabulary(folder), Limits(64, 64)
    encoded = encode_pair(good, vocabulary, limits)
    whole = "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert encoded.prompt.tolist() == tokenizer.encode(whole, add_special_tokens=False).ids
    assert encoded.responses[0].tolist() == tokenizer.encode("yes<|im_end|>", add_special_tokens=False).ids
    assert encode_pair(bad, vocabulary, limits, bad_pairs="drop") == Dropped("end mark within a response", f"{path}:2")


def test_a_prompt_over_the_limit_keeps_its_end_and_its_begin_id(folder):
    make_tokenizer(folder)
    vocabulary, pair = load_vocabulary(folder), TextPair("abcdef", ("y", "n"), (1.0, 0.0))
    ids = vocabulary.encode("abcdef")
    for length, expected in [(7, [2, *ids]), (6, [2, *ids[1:]]), (2, [2, ids[-1]]), (1, [2])]:
        encoded = encode_pair(pair, vocabulary, Limits(length, 8, long_prompts="keep_end"))
        assert encoded.prompt.tolist() == expected and encoded.prompt_was_cut == (length < 7)
    make_tokenizer(folder, begins=False)
    encoded = encode_pair(pair, load_vocabulary(folder), Limits(2, 8, long_prompts="keep_end"))
    assert encoded.prompt.tolist() == ids[-2:]
