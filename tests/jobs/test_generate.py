"""Datasets of new responses: in the order of the policies, equal in any batches, and labelled by any judge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from job_runs import Bar, Stopped, run_job
from random_examples import plain
from test_label import random_pairs
from tiny_models import random_params

from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.errors import UserError
from alignment_gap.evaluation.batching import Batching
from alignment_gap.jobs import parts
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.generate import GENERATE, GenerateConfig, drawing, sample_examples
from alignment_gap.judges import JudgeConfig
from alignment_gap.sampling import SamplerConfig, Samples


@jax.jit
def echo(ids, prompts, lengths):
    """Two responses: the prompt's id with an end, and the first token of the prompt."""
    first = jnp.stack([jnp.stack([ids, jnp.ones_like(ids)], 1), jnp.stack([prompts[:, 0], 0 * ids], 1)], 1)
    zeros = jnp.zeros(first.shape)
    return Samples(first, jnp.broadcast_to(jnp.array([2, 1]), (len(ids), 2)), zeros, zeros)


def test_samples_come_in_the_order_of_the_policies_and_are_not_yet_labelled(mesh):
    examples = random_pairs(11)

    def draw(batching, rows):
        return batching.run(echo, rows)

    found = list(sample_examples(examples, [draw, draw], Batching(mesh, 8, ((6, 2),))))
    for before, after in zip(examples, found, strict=True):
        first = before.prompt[0]
        assert [r.tolist() for r in after.responses] == [[before.prompt_id, 1], [first], [before.prompt_id, 1], [first]]
        assert after.scores.tolist() == [0.5] * 4
        assert (after.prompt_id, after.prompt.tolist()) == (before.prompt_id, before.prompt.tolist())


@pytest.mark.slow
def test_a_network_samples_alike_in_buckets(even_policy, mesh):
    """Equal seeds draw equal tokens."""
    params, examples = random_params(even_policy), random_pairs(29)
    settings = {"samples": 2, "max_length": 4, "eos_id": 1, "config": SamplerConfig()}
    draw = drawing(even_policy, params, mesh, jax.random.key(3), **settings)
    whole, buckets = (
        [plain(e) for e in sample_examples(examples, [draw], Batching(mesh, 8, shapes))]
        for shapes in (((6, 4),), ((3, 4), (6, 4)))
    )
    assert whole == buckets
    assert len({tuple(response) for example in whole for response in example[2]}) > 29


@pytest.fixture(scope="module")
def config(pairs, sft):
    return GenerateConfig(str(pairs), (str(sft),), limit=20, response_length=6, batch_size=8, buckets=1)


def generated(config, folder, bar=None):
    make(GENERATE, config, folder, bar or Bar())
    return open_dataset(folder)


def test_one_policy_answers_twice_and_the_judge_compares(config, judge, pairs, tmp_path):
    found = generated(dataclasses.replace(config, judge=JudgeConfig(str(judge))), tmp_path / "out")
    assert len(found) == 20 and found.card.responses_per_prompt == 2 and found.card.max_response_length <= 6
    assert [e.prompt.tolist() for e in found] == [e.prompt.tolist() for e in open_dataset(pairs)[:20]]
    assert {tuple(e.scores.tolist()) for e in found} <= {(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)}
    assert any(e.scores[0] != 0.5 for e in found)
    made = found.card.provenance
    assert made["made_by"] == "generate" and made["judge"] == str(judge) and made["policy 0"] == config.policies[0]


def test_two_policies_against_each_other(config, sft, sft_config, tmp_path):
    """The first policy answers as it does alone. The second one has its own random keys."""
    other = run_job(dataclasses.replace(sft_config, start=str(sft), steps=2), tmp_path / "other")
    policies = (str(sft), str(other))
    both = generated(dataclasses.replace(config, policies=policies), tmp_path / "both")
    alone = generated(dataclasses.replace(config, samples=1), tmp_path / "alone")
    twice = generated(dataclasses.replace(config, policies=(str(sft), str(sft))), tmp_path / "twice")
    for pair, single, same in zip(both, alone, twice, strict=True):
        assert pair.responses[0].tolist() == single.responses[0].tolist() == same.responses[0].tolist()
    assert any(e.responses[0].tolist() != e.responses[1].tolist() for e in twice)


def test_rewards_of_the_rubric_for_more_than_two_responses(config, tmp_path):
    judge = JudgeConfig("rubric", labels="rewards")
    found = generated(dataclasses.replace(config, samples=3, judge=judge), tmp_path / "out")
    assert found.card.scores == "rewards" and found.card.responses_per_prompt == 3
    rubric = rubric_of(found)
    for example in found:
        np.testing.assert_allclose(example.scores, rubric([example.prompt] * 3, example.responses), rtol=1e-6)


@pytest.mark.slow
def test_killed_half_way_it_goes_on_and_ends_the_same(config, judge, tmp_path, monkeypatch):
    """Even with another batch size: a response depends only on its prompt and the seed."""
    monkeypatch.setattr(parts, "part_size", lambda count: 8)
    config = dataclasses.replace(config, judge=JudgeConfig(str(judge)))
    with pytest.raises(Stopped):
        generated(config, tmp_path / "killed", Bar(stop_at=8))
    found = generated(dataclasses.replace(config, batch_size=16), tmp_path / "killed")
    whole = generated(config, tmp_path / "whole")
    assert [*map(plain, found)] == [*map(plain, whole)]
    assert [*map(plain, generated(dataclasses.replace(config, seed=1), tmp_path / "other"))] != [*map(plain, whole)]


BAD = {
    "no policy": ({"policies": ()}, "policies is not set"),
    "three policies": ({"policies": ("a", "b", "c")}, "policies has 3 folders"),
    "no run": ({"policies": ("nowhere",)}, "nowhere has no complete checkpoint"),
    "no prompts": ({"prompts": None}, "prompts is not set"),
    "nothing to compare": ({"samples": 1, "judge": JudgeConfig("rubric")}, "one response per prompt leaves nothing"),
    "batch": ({"batch_size": 9}, "batch_size is 9"),
    "length": ({"response_length": 0}, "response_length is 0"),
    "seed": ({"seed": 2**32}, "seed is 4294967296"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_told_before_anything_is_written(name, config, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        generated(dataclasses.replace(config, **changes), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_preference_model_is_no_policy(config, judge, tmp_path):
    with pytest.raises(UserError, match="holds a preference model: give the folder of a policy"):
        generated(dataclasses.replace(config, policies=(str(judge),)), tmp_path / "out")


@pytest.fixture(scope="module")
def strange(pairs, tmp_path_factory):
    """The pairs with the id 200 in one prompt and in one response; the networks have 136 rows."""
    folder, (examples, card) = tmp_path_factory.mktemp("strange"), (open_dataset(pairs)[:16], open_dataset(pairs).card)
    changes = {"prompt": {"prompt": np.array([5, 200], np.int32)}}
    changes["response"] = {"responses": (np.array([5, 200, 1], np.int32), examples[9].responses[1])}
    for name, change in changes.items():
        changed = [*examples[:9], dataclasses.replace(examples[9], **change), *examples[10:]]
        settings = {"vocabulary_digest": card.vocabulary_digest, "provenance": dict(card.provenance)}
        write_dataset(folder / name, changed, **settings)
    return folder


def test_a_prompt_with_a_token_id_that_the_policy_lacks_is_told(config, strange, tmp_path):
    changed = dataclasses.replace(config, prompts=str(strange / "prompt"))
    with pytest.raises(UserError, match="a prompt has the token id 200, but the policy has vocabulary_size=136: use a"):
        generated(changed, tmp_path / "out")


@pytest.mark.parametrize(("name", "classified", "said"), [("prompt", 0, "a text has"), ("response", 8, "a pair has")])
def test_an_evaluation_tells_a_token_id_that_a_network_lacks_before_it_samples(
    name, classified, said, sft, judge, strange, tmp_path
):
    config = EvaluateConfig(
        str(sft), dataset=str(strange / name), judges=(str(judge),), reference=str(sft), pairs=classified, batch_size=8
    )
    with pytest.raises(UserError, match=r"has the token id 200, but .* has vocabulary_size=136: use a") as error:
        make(EVALUATE, config, tmp_path / "out", Bar())
    assert said in str(error.value) and not (tmp_path / "out").exists()


def test_an_evaluation_of_a_judge_tells_a_token_id_that_it_lacks(judge, strange, tmp_path):
    config = EvaluateConfig(str(judge), dataset=str(strange / "response"), pairs=8, batch_size=8)
    with pytest.raises(UserError, match=rf"a text has the token id 200, but the judge {judge} has vocabulary_size=136"):
        make(EVALUATE, config, tmp_path / "out", Bar())
    assert not (tmp_path / "out").exists()
