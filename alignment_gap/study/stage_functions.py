"""What the stages do: each fills its folder from the folders of the stages before it."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment_gap import losses
from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.collation import examples_of
from alignment_gap.data.records.dataset import (
    Example,
    close_dataset,
    derived,
    open_dataset,
    write_chunk,
    write_dataset,
)
from alignment_gap.data.tasks.task import build_task, rubric_preference
from alignment_gap.evaluation.datasets import draw, label
from alignment_gap.evaluation.metrics import classification
from alignment_gap.folders import write_bytes, write_json
from alignment_gap.models import PreferenceModel
from alignment_gap.sampling import Labeller, Samples, online_source, preference_labeller
from alignment_gap.sharding import replicated
from alignment_gap.study.artefacts import Progress
from alignment_gap.study.bench import Bench
from alignment_gap.study.config import Arm, JudgeConfig, takes_beta
from alignment_gap.training import Source, policy_objective, preference_objective, with_reference

# The stream of an online run, in its folder.
RECORD = "record"
# Pairs that a judge's accuracy is measured on.
JUDGED_PAIRS = 1000


def write_data(bench: Bench, folder: Path, progress: Progress) -> None:
    """Human pairs, training and validation, as datasets."""
    task = build_task(bench.config.task)
    for name, examples in (("train", task.pairs), ("validation", task.validation)):
        _write(bench, folder / name, examples, dict(task.provenance) | {"split": name})
    progress(1)


def train_sft(bench: Bench, folder: Path, progress: Progress, data: Path) -> None:
    """The policy that every arm starts from and is measured against: both responses of every pair are targets."""
    config = bench.config.sft
    batches = bench.offline("sft", open_dataset(data / "train"), config.batch_size)
    bench.train(
        folder,
        progress,
        name="sft",
        objective=policy_objective(bench.policy, losses.get("sft")),
        optimizer=config.optimizer,
        source=lambda step, _: batches(step),
        checkpoint_steps=bench.checkpoint_steps(config.steps),
        network=bench.policy,
    )


def train_golden(bench: Bench, folder: Path, progress: Progress, data: Path, *sft: Path) -> None:
    """The preference model of the human labels, and how often it agrees with them and with the rubric."""
    _train_judge(bench, folder, progress, "golden", bench.golden, bench.config.golden, data, *sft)
    validation = open_dataset(data / "validation")[:JUDGED_PAIRS]
    preferences = _preferences(bench, bench.golden, folder, validation)
    facts = {"validation_accuracy": _agreement(preferences, _labels(validation)), "rubric_agreement": None}
    if bench.rubric is not None:
        facts["rubric_agreement"] = _agreement(preferences, rubric_preference(bench.rubric, validation))
    write_json(folder / "facts.json", facts)


def relabel(bench: Bench, folder: Path, progress: Progress, data: Path, golden: Path) -> None:
    """D_golden: the human pairs with the golden model's hard labels; a tie is a tie."""
    labeller = _labeller(bench, bench.golden, golden)
    for split in ("train", "validation"):
        human = open_dataset(data / split)
        provenance = derived("relabel", {"pairs": human}, preference_model=golden.name)
        _write(bench, folder / split, label(human, labeller, bench.batching), provenance)
    progress(1)


def train_proxy(bench: Bench, folder: Path, progress: Progress, relabelled: Path, *sft: Path) -> None:
    """The preference model of D_golden, and how often it agrees with the golden model."""
    _train_judge(bench, folder, progress, "proxy", bench.proxy, bench.config.proxy, relabelled, *sft)
    facts = {}
    for split in ("train", "validation"):
        examples = open_dataset(relabelled / split)[:JUDGED_PAIRS]
        preferences = _preferences(bench, bench.proxy, folder, examples)
        facts[f"{split}_accuracy"] = _agreement(preferences, _labels(examples))
    write_json(folder / "facts.json", facts)


def _train_judge(
    bench: Bench,
    folder: Path,
    progress: Progress,
    name: str,
    model: PreferenceModel,
    config: JudgeConfig,
    data: Path,
    *sft: Path,
) -> None:
    batches = bench.offline(name, open_dataset(data / "train"), config.batch_size)
    bench.train(
        folder,
        progress,
        name=name,
        objective=preference_objective(model, bench.key(f"{name} order")),
        optimizer=config.optimizer,
        source=lambda step, _: batches(step),
        checkpoint_steps=bench.checkpoint_steps(config.steps),
        network=model,
        params=bench.params(sft[0], bench.policy) if sft else None,
    )


def train_online(
    bench: Bench, folder: Path, progress: Progress, sft: Path, relabelled: Path, judge: Path, *, arm: Arm
) -> None:
    """An online arm: fresh pairs of the current policy, labelled by a judge, and recorded as D_online."""
    model = bench.golden if arm.name == "golden" else bench.proxy
    examples = open_dataset(relabelled / "train")
    prompts = bench.offline("online prompts", examples, bench.config.arms.batch_size)
    source = online_source(prompts, bench.draw_pairs, _labeller(bench, model, judge), bench.key(arm.title))

    def record(step: int, batches: list[PreferenceBatch]) -> None:
        write_chunk(folder / RECORD, f"until-{step:08d}", (row for batch in batches for row in examples_of(batch)))

    _train_arm(bench, folder, progress, arm, source, sft, record)
    close_dataset(
        folder / RECORD,
        vocabulary_digest=bench.vocabulary.digest,
        provenance=derived("online", {"prompts": examples}, arm=arm.title, preference_model=judge.name),
    )


def train_offline(bench: Bench, folder: Path, progress: Progress, sft: Path, pairs: Path, *, arm: Arm) -> None:
    """An offline arm: the same update step on a recorded dataset, D_golden or shuffled D_online."""
    examples = open_dataset(pairs / (RECORD if arm.name == "shuffled" else "train"))
    batches = bench.offline(arm.name, examples, bench.config.arms.batch_size)
    _train_arm(bench, folder, progress, arm, lambda step, _: batches(step), sft)


def _train_arm(
    bench: Bench,
    folder: Path,
    progress: Progress,
    arm: Arm,
    source: Source,
    sft: Path,
    record: Callable[[int, list[PreferenceBatch]], None] | None = None,
) -> None:
    """Online and offline alike: the SFT policy is the start and the reference, the source is all that differs."""
    config = bench.config.arms
    loss = losses.get(arm.loss, beta=arm.beta) if takes_beta(arm.loss) else losses.get(arm.loss)
    reference = bench.params(sft, bench.policy)
    bench.train(
        folder,
        progress,
        name=arm.title,
        objective=policy_objective(bench.policy, loss),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=arm.learning_rate),
        source=with_reference(source, bench.score, reference),
        checkpoint_steps=config.checkpoint_steps,
        network=bench.policy,
        params=reference,
        on_checkpoint=record,
    )


def draw_opponents(
    bench: Bench, folder: Path, progress: Progress, sft: Path, relabelled: Path, golden_policy: Path
) -> None:
    """One response of the golden policy and of SFT to every evaluation prompt, for all checkpoints to play against."""
    prompts = _evaluation_prompts(bench, relabelled)
    for name, trained in (("golden", golden_policy), ("sft", sft)):
        drawn = _draw(bench, bench.params(trained, bench.policy), prompts, f"opponent {name}")
        _save_arrays(folder / f"{name}.npz", responses=drawn.responses[:, 0], lengths=drawn.lengths[:, 0])
        progress(1)


def evaluate(
    bench: Bench,
    folder: Path,
    progress: Progress,
    trained: Path,
    opponents: Path,
    relabelled: Path,
    golden: Path,
    proxy: Path,
    sft: Path,
    *,
    steps: Sequence[int | None],
) -> None:
    """Measures checkpoints of one run, prompt by prompt and pair by pair; None is a run's last checkpoint."""
    prompts = _evaluation_prompts(bench, relabelled)
    pairs = bench.batching.collate(open_dataset(relabelled / "train")[-bench.config.evaluation.pairs :])
    golden_params, proxy_params = (
        bench.params(path, model.policy) for path, model in ((golden, bench.golden), (proxy, bench.proxy))
    )
    reference = bench.params(sft, bench.policy)
    against = {name: np.load(opponents / f"{name}.npz") for name in ("golden", "sft")}
    for step in steps:
        path = folder / f"{step or 0}.npz"
        if not path.exists():
            params = bench.params(trained, bench.policy, step)
            drawn = _draw(bench, params, prompts, f"evaluation {trained.name} {step}")

            def wins(judge: Any, judge_params: Any, opponent: str, drawn: Any = drawn) -> np.ndarray:
                first = (drawn.responses[:, 0], drawn.lengths[:, 0])
                second = (against[opponent]["responses"], against[opponent]["lengths"])
                rows = (prompts.prompts, prompts.prompt_lengths, *first, *second)
                return bench.batching.run(functools.partial(judge, judge_params), rows)

            outcomes = {
                "win_rate": wins(bench.golden_judge, golden_params, "golden"),
                "win_rate_sft": wins(bench.golden_judge, golden_params, "sft"),
                "proxy_win_rate": wins(bench.proxy_judge, proxy_params, "golden"),
                "length": drawn.lengths[:, 0].astype(np.float64),
                "kl": _divergence(bench, params, reference, prompts, drawn),
                **_classification(bench, params, reference, pairs),
            }
            if bench.rubric is not None:
                outcomes["rubric"] = _rubric(bench, prompts, drawn)
            _save_arrays(path, responses=drawn.responses[:, 0], lengths=drawn.lengths[:, 0], **outcomes)
        progress(1)


def evaluation_prompts(bench: Bench, relabelled: Path) -> list[Example]:
    """The first prompts of D_golden, the same for every checkpoint of a seed; prompts are in no order of kind."""
    return open_dataset(relabelled / "train")[: bench.config.evaluation.prompts]


def _evaluation_prompts(bench: Bench, relabelled: Path) -> PreferenceBatch:
    return bench.batching.collate(evaluation_prompts(bench, relabelled))


def _draw(bench: Bench, params: Any, prompts: PreferenceBatch, name: str) -> Samples:
    """One sample for each prompt; the name and the seed decide which."""
    step = jax.device_put(jnp.int32(0), replicated(bench.mesh))
    return draw(prompts, functools.partial(bench.draw_one, params, bench.key(name), step), bench.batching)


def _divergence(bench: Bench, params: Any, reference: Any, prompts: PreferenceBatch, drawn: Any) -> np.ndarray:
    rows = slice(bench.config.evaluation.kl_prompts)
    arrays = (prompts.prompts[rows], prompts.prompt_lengths[rows], drawn.responses[rows], drawn.lengths[rows])
    return bench.batching.run(functools.partial(bench.divergence, params, reference), arrays)


def _classification(bench: Bench, params: Any, reference: Any, pairs: PreferenceBatch) -> dict[str, np.ndarray]:
    arrays = (pairs.prompts, pairs.prompt_lengths, pairs.responses, pairs.response_lengths)
    policy, sft = (bench.batching.run(functools.partial(bench.score, p), arrays) for p in (params, reference))
    return classification(policy, sft, np.asarray(pairs.scores))


def _rubric(bench: Bench, prompts: PreferenceBatch, drawn: Any) -> np.ndarray:
    texts = [row[:size].tolist() for row, size in zip(prompts.prompts, prompts.prompt_lengths, strict=True)]
    answers = [row[:size].tolist() for row, size in zip(drawn.responses[:, 0], drawn.lengths[:, 0], strict=True)]
    assert bench.rubric is not None
    return bench.rubric(texts, answers)


def _labeller(bench: Bench, model: PreferenceModel, folder: Path) -> Labeller:
    return preference_labeller(model, bench.params(folder, model.policy), bench.mesh)


def _preferences(bench: Bench, model: PreferenceModel, folder: Path, pairs: Sequence[Example]) -> np.ndarray:
    """The judge's preference for the first response of every pair, by the sign rule."""
    return _labels(list(label(pairs, _labeller(bench, model, folder), bench.batching)))


def _labels(pairs: Sequence[Example]) -> np.ndarray:
    return np.array([example.scores[0] for example in pairs])


def _agreement(preferences: np.ndarray, labels: np.ndarray) -> float:
    """Share of pairs on which both prefer the same response; a tie of one is half."""
    return float(np.mean(1 - np.abs(preferences - labels)))


def _write(bench: Bench, folder: Path, examples: Iterable[Example], provenance: dict[str, Any]) -> None:
    write_dataset(folder, examples, vocabulary_digest=bench.vocabulary.digest, provenance=provenance)


def _save_arrays(path: Path, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
