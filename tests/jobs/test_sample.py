"""Responses to prompts from a dataset, from a file and from the keyboard."""

import dataclasses
import io
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from job_runs import run_job

from alignment_gap.checkpoints import find_checkpoint, read_network
from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.text import extra_id, load_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.jobs.sample import SampleConfig, sample_texts
from alignment_gap.models import score
from alignment_gap.sampling import SamplerConfig
from alignment_gap.training import load_policy

PROMPTS = ["the tea was sour . summary:", "my sister lost the keys at the park . summary:", "in june i felt tired ."]


def tokens_of(text):
    """The ids of a text, which may name ids that are not words."""
    vocabulary = load_vocabulary("posts")
    named = re.compile(r"<no_token_(\d+)>|<extra_id_(\d+)>")
    ids = []
    for word in text.split():
        match = named.fullmatch(word)
        ids += (
            vocabulary.encode(word)
            if not match
            else [int(match[1]) if match[1] else extra_id(vocabulary, int(match[2]))]
        )
    return ids


@pytest.fixture(scope="module")
def config(sft):
    return SampleConfig(str(sft), samples=2, response_length=6, format="jsonl")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "more": 1}) for prompt in PROMPTS) + "\n\n")
    return path


def records(config):
    return [json.loads(text) for text in sample_texts(config)]


@pytest.mark.slow
def test_a_record_for_every_prompt_with_the_policy_s_own_log_probs(config, file, sft, mesh):
    found = records(dataclasses.replace(config, prompts=str(file)))
    assert [record["prompt"] for record in found] == PROMPTS
    vocabulary = load_vocabulary("posts")
    policy, params = load_policy(sft, mesh)
    for record in found:
        assert len(record["responses"]) == len(record["tokens"]) == len(record["log_probs"]) == 2
        prompt = np.array([vocabulary.encode(record["prompt"])], np.int32)
        for text, count, log_prob in zip(record["responses"], record["tokens"], record["log_probs"], strict=True):
            # An answer that is shorter than the limit has an end, which is also a token.
            tokens = [*tokens_of(text), vocabulary.eos_id][:count]
            assert len(tokens) == count <= 6
            response = np.array([[tokens]], np.int32)
            lengths = (np.array([prompt.shape[1]], np.int32), np.array([[count]], np.int32))
            scored = jax.jit(lambda *rows: score(policy, *rows))(params, prompt, lengths[0], response, lengths[1])
            assert float(scored.sum()) == pytest.approx(log_prob, abs=2e-3)


def test_the_batch_does_not_count_and_the_seed_does(config, file):
    config = dataclasses.replace(config, prompts=str(file))
    whole = records(config)
    assert records(dataclasses.replace(config, batch_size=16)) == whole
    assert records(dataclasses.replace(config, limit=2)) == whole[:2]
    assert records(dataclasses.replace(config, seed=1)) != whole
    greedy = dataclasses.replace(config, sampler=SamplerConfig(top_k=1))
    assert all(len({*record["responses"]}) == 1 for record in records(greedy))


def test_a_prompt_that_comes_again_gets_new_answers_in_the_same_batch_and_in_a_later_one(config, tmp_path):
    """With 8 rows the second one comes in the first batch, the third in the second batch; with 16 in one."""
    feelings = ("tired", "happy", "angry", "nervous", "calm", "sad")
    lines = [PROMPTS[0], PROMPTS[0], *(f"in june i felt {feeling} ." for feeling in feelings)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*lines, PROMPTS[0]]))
    found = records(dataclasses.replace(config, prompts=str(path), batch_size=8))
    assert records(dataclasses.replace(config, prompts=str(path), batch_size=16)) == found
    answers = [str(record["responses"]) for record in found if record["prompt"] == PROMPTS[0]]
    assert len(answers) == 3 and len({*answers}) == 3
    path.write_text(PROMPTS[0])
    assert records(dataclasses.replace(config, prompts=str(path)))[0] == found[0]


def test_prompts_of_a_dataset_of_lines_and_of_the_keyboard(config, pairs, file, tmp_path, monkeypatch):
    of_dataset = records(dataclasses.replace(config, prompts=str(pairs), limit=3))
    vocabulary = load_vocabulary("posts")
    prompts = [vocabulary.decode(example.prompt) for example in open_dataset(pairs)[:3]]
    assert [record["prompt"] for record in of_dataset] == prompts
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(PROMPTS))
    expected = records(dataclasses.replace(config, prompts=str(file)))
    assert records(dataclasses.replace(config, prompts=str(lines))) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([PROMPTS[0], "", *PROMPTS[1:]])))
    assert records(config) == expected


@pytest.mark.slow
def test_prompts_end_as_those_that_the_run_was_trained_on(config, sft_config, pairs, file, tmp_path):
    """The dataset's card says that its prompts end with the end id. Typed prompts then end with it too."""
    examples, card = open_dataset(pairs)[:16], open_dataset(pairs).card
    ended = [dataclasses.replace(each, prompt=np.append(each.prompt, np.int32(1))) for each in examples]
    provenance = card.provenance | {"end_prompts": True}
    write_dataset(tmp_path / "ended", ended, vocabulary_digest=card.vocabulary_digest, provenance=provenance)
    source = dataclasses.replace(sft_config.source, folder=str(tmp_path / "ended"))
    run = run_job(dataclasses.replace(sft_config, source=source, steps=1), tmp_path / "run")
    assert read_network(find_checkpoint(run)).end_prompts
    assert not read_network(find_checkpoint(pathlib.Path(config.run))).end_prompts
    of_dataset = dataclasses.replace(config, run=str(run), prompts=str(tmp_path / "ended"), limit=3)
    expected = records(of_dataset)
    vocabulary = load_vocabulary("posts")
    file.write_text("".join(json.dumps({"prompt": vocabulary.decode(each.prompt)}) + "\n" for each in ended))
    typed = dataclasses.replace(of_dataset, prompts=str(file))
    assert records(typed) == records(dataclasses.replace(typed, end_prompts=True)) == expected
    assert records(dataclasses.replace(typed, end_prompts=False)) != expected


def test_as_text(config, file):
    texts = [*sample_texts(dataclasses.replace(config, prompts=str(file), format="text"))]
    assert len(texts) == 3
    for text, record in zip(texts, records(dataclasses.replace(config, prompts=str(file))), strict=True):
        assert text == "\n".join([record["prompt"], *(f"  {response}" for response in record["responses"]), ""])


BAD = {
    "no run": ({"run": None}, "run is not set"),
    "missing": ({"run": "nowhere"}, "nowhere has no complete checkpoint"),
    "judge": ({"run": "JUDGE"}, "preference model"),
    "step": ({"step": 3}, "3"),
    "prompts": ({"prompts": "nowhere"}, "prompts is 'nowhere': give a dataset's folder or a file"),
    "vocabulary": ({"vocabulary": "bytes"}, "was trained with the vocabulary"),
    "record": ({"prompts": "BROKEN"}, r'broken.jsonl:2 has no prompt: write {"prompt": ...}'),
    "word": ({"prompts": "WORD"}, "word.txt:2: word 'τί' is not among the"),
    "empty prompt": ({"prompts": "NOTHING"}, "nothing.jsonl:2: the prompt is empty: write a text, or remove it"),
    "no prompts": ({"prompts": "EMPTY"}, "empty.txt holds no prompt: write one on each line"),
    "format": ({"format": "xml"}, "format is 'xml': choose one of text, jsonl"),
    "samples": ({"samples": 0}, "samples is 0"),
    "batch": ({"batch_size": 9}, "batch_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_line(name, config, judge, file, tmp_path):
    changes, message = BAD[name]
    (tmp_path / "broken.jsonl").write_text('{"prompt": "in june ."}\n{"text": "x"}\n')
    (tmp_path / "word.txt").write_text("in june .\nin τί .\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "nothing.jsonl").write_text('{"prompt": "in june ."}\n{"prompt": ""}\n')
    places = {"JUDGE": str(judge), "BROKEN": str(tmp_path / "broken.jsonl")}
    places |= {"WORD": str(tmp_path / "word.txt"), "EMPTY": str(tmp_path / "empty.txt")}
    places["NOTHING"] = str(tmp_path / "nothing.jsonl")
    changes = {key: places.get(value, value) for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as error:
        records(dataclasses.replace(config, **{"prompts": str(file)} | changes))
    assert "\n" not in str(error.value)
