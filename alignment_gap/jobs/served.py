"""Checks, before the first step, that a job's sources provide what its loss reads."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alignment_gap import losses
from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.records.dataset import Card
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig, SourceConfig
from alignment_gap.judges import REWARDS
from alignment_gap.sampling import SamplerConfig
from alignment_gap.training import apply_loss, loss_inputs

# Names of a batch's optional arrays on a dataset's card.
REFERENCE_LOG_PROBS, SAMPLER_LOG_PROBS = "reference_log_probs", "sampler_log_probs"
# Where the card of an online record says which labels its judge gave.
LABELS_OF_RECORD = "labels"
# Where it says which reference the recorded log-probs are of.
REFERENCE_PLACE, REFERENCE_DIGEST = "reference", "reference_digest"
_FRESH = ("fresh_", "ref_fresh_")
# Settings of a sampler that change the distribution of its samples.
_SAMPLER = ("temperature", "top_k", "top_p")


def _reads_fresh(loss: Callable[..., Any]) -> bool:
    """Whether a loss reads the log-probs of fresh samples beside the batch."""
    return any(array.startswith(_FRESH) for array in losses.arrays(loss))


def reads_mismatched(loss: Callable[..., Any]) -> bool:
    """Whether a loss reads the log-probs of other prompts' responses."""
    return "kl_logps" in losses.arrays(loss)


def _reference_arrays(loss: Callable[..., Any]) -> dict[str, bool]:
    """The arrays of a reference that a loss names, and whether each is required."""
    return {name: required for name, required in losses.arrays(loss).items() if name.startswith("ref_")}


def has_reference(config: JobConfig, loss: Callable[..., Any]) -> bool:
    """Whether the job has a reference of its own: the one that is set, or its start if the loss reads a reference."""
    return config.reference is not None or (config.start is not None and bool(_reference_arrays(loss)))


def needs_reference(config: JobConfig, loss: Callable[..., Any], fields: Collection[str]) -> bool:
    """Whether a reference policy has to score batches.

    Args:
      config: settings of the job.
      loss: its loss.
      fields: optional arrays of the recorded examples; empty for an online source.

    Raises:
      UserError: the loss requires a reference, but the job has none; or the reference should move but cannot.
    """
    moving = config.reference_every is not None
    if moving and REFERENCE_LOG_PROBS in fields:
        raise UserError(
            f"{config.recorded.folder} has the log-probs of a fixed reference: leave "
            f"reference_every={config.reference_every} out"
        )
    if REFERENCE_LOG_PROBS in fields and config.fresh is None and not reads_mismatched(loss):
        return False
    there = config.reference is not None or config.start is not None
    if not there and any(_reference_arrays(loss).values()):
        raise UserError(
            f"the loss {config.loss.name} needs a reference policy: set start or reference to the folder of a run, "
            "such as one of supervised fine-tuning"
        )
    needed = has_reference(config, loss)
    if moving and not needed:
        raise UserError(
            f"reference_every is {config.reference_every}, but the loss {config.loss.name} reads no reference: leave "
            "it out"
        )
    return needed


@contextlib.contextmanager
def tracing(loss: LossConfig) -> Iterator[None]:
    """Turns what a loss raises while it is traced into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the loss {loss.name} with {dict(loss.settings)} does not run: {reason}") from error


def check_runs(config: JobConfig, loss: Callable[..., Any]) -> None:
    """Traces a job's loss on two prompts with every array that a batch may have; raises UserError if it does not run.

    A dataset counts as one of pairs.
    """
    samples = config.source.kept if isinstance(config.source, OnlineConfig) else 2

    def array(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    sums, log_probs = (array(2, samples, *more, dtype=jnp.float32) for more in ((), (3,)))
    responses = array(2, samples, 3), array(2, samples), sums
    batch = PreferenceBatch(array(2), array(2, 3), array(2), *responses, log_probs, log_probs)

    def applied(batch: PreferenceBatch, log_probs: Any, sums: Any) -> Any:
        beside = {f"{reference}{other}_logps": sums for reference in ("", "ref_") for other in ("fresh", "kl")}
        return apply_loss(loss, loss_inputs(batch, log_probs, log_probs) | beside)

    try:
        with tracing(config.loss):
            jax.eval_shape(applied, batch, log_probs, sums)
    except UserError as error:
        raise UserError(f"the loss {config.loss.name}: {error}") from error


def check_served(config: JobConfig, loss: Callable[..., Any], fields: Collection[str]) -> None:
    """Raises UserError if the job's sources do not provide what the loss reads.

    Args:
      config: settings of the job.
      loss: its loss.
      fields: optional arrays of the source's recorded examples; empty for an online source.
    """
    name, reads, source = config.loss.name, losses.reads(loss), config.source
    wants_fresh = _reads_fresh(loss)
    if wants_fresh and config.fresh is None:
        raise UserError(f"the loss {name} reads fresh samples beside the batch: set fresh to a second source")
    if config.fresh is not None and not wants_fresh:
        raise UserError(f"the loss {name} reads no second source: leave fresh out, or choose a loss such as hypo")
    if wants_fresh and config.recorded.packing is not None:
        raise UserError(
            f"the loss {name} needs fresh samples for every prompt, but packed rows have empty slots: leave packing "
            "out, and set buckets instead"
        )
    on_policy = losses.SAMPLER_LOG_PROBS in reads or losses.OWN_SAMPLES in reads
    if on_policy and isinstance(source, DatasetConfig) and not wants_fresh and SAMPLER_LOG_PROBS not in fields:
        raise UserError(
            f"the loss {name} needs samples of the policy with the sampler's log-probs, but {source.folder} has no "
            "such log-probs: train online, or on the record of an online run"
        )
    if on_policy and config.online is not None and config.online.keep != "all":
        raise UserError(
            f"the loss {name} is a mean over the policy's samples, but keep is {config.online.keep!r}, and training on "
            "selected samples biases its gradient: set it to 'all', or choose a loss of pairs, such as ipo"
        )
    # A loss that reads a second source needs only that one to be the policy's.
    _check_own_samples(name, reads, config.fresh if wants_fresh else source)
    if isinstance(source, OnlineConfig) and losses.PROBABILITIES in reads and source.judge.labels == REWARDS:
        raise UserError(
            f"the loss {name} reads scores as probabilities, but judge.labels is 'rewards': set it to 'hard' or 'soft'"
        )
    if losses.OTHER_PROMPTS in reads and config.recorded.packing is not None:
        raise UserError(
            f"with the loss {name}, a prompt's loss depends on the batch's other prompts, but packed rows have empty "
            "slots: leave packing out, and set buckets instead"
        )
    if losses.WIDTH in reads and (config.recorded.packing is not None or config.recorded.buckets > 1):
        raise UserError(
            f"the loss {name} divides by the width of a batch's rows, which packing and buckets change: set its "
            "max_length in LossConfig.settings"
        )


def check_cards(
    config: JobConfig, loss: Callable[..., Any], cards: Sequence[Card], fresh_cards: Sequence[Card] = ()
) -> None:
    """Raises UserError if the cards of recorded examples say that the loss cannot be right on them.

    Args:
      config: settings of the job.
      loss: its loss.
      cards: the cards of the source's datasets; for an online source, those of its prompts.
      fresh_cards: the same of the second source.
    """
    reads = losses.reads(loss)
    if isinstance(config.source, DatasetConfig):
        check_scores(config, loss, cards, str(config.source.folder))
    sampled, its_cards = (config.fresh, fresh_cards) if _reads_fresh(loss) else (config.source, cards)
    if not isinstance(sampled, DatasetConfig):
        return
    for card in its_cards:
        if losses.OWN_SAMPLES in reads:
            _check_own_record(config.loss.name, sampled, card)
        elif losses.SAMPLER_LOG_PROBS in reads:
            _check_kept(config.loss.name, sampled, card)


def sampled_as(online: OnlineConfig, batch_size: int) -> dict[str, Any]:
    """The facts on the card of an online record that say how its samples were drawn."""
    sampler = online.sampler
    return {
        "samples": online.samples,
        "batch_size": batch_size,
        "keep": online.keep,
        "refresh_every": online.refresh_every,
        "against": online.against,
        "mixture": online.mixture,
        **{name: getattr(sampler, name) for name in _SAMPLER},
    }


def _check_kept(name: str, source: DatasetConfig, card: Card) -> None:
    """Raises UserError if an online run recorded only the best of its samples, or the best and the worst."""
    for made in _records(card.provenance):
        if (keep := made.get("keep", "all")) != "all":
            raise UserError(
                f"the loss {name} is a mean over the policy's samples, but {source.folder} was recorded with "
                f"keep={keep!r}, and training on selected samples biases its gradient: train on a record with "
                "keep='all', or choose a loss of pairs, such as ipo"
            )


def _check_own_record(name: str, source: DatasetConfig, card: Card) -> None:
    """Raises UserError unless a card says that a replay in its order is a run of this loss on its own samples."""
    made, what = card.provenance, f"the loss {name} is only right for samples of the current policy"
    remedy = f"train online, or on the record of an online run of {name}"
    if made.get("made_by") != "online" or SAMPLER_LOG_PROBS not in card.fields:
        raise UserError(f"{what}, but {source.folder} is not the record of an online run: {remedy}")
    if not {"against", "batch_size", "loss", *_SAMPLER} <= made.keys():
        raise UserError(
            f"{what}, but the card of {source.folder} does not say how they were drawn, because an earlier version "
            f"recorded it: {remedy} of this version"
        )
    sampler = SamplerConfig(**{setting: made[setting] for setting in _SAMPLER})
    wanted = {"loss": name, "batch_size": source.batch_size, "refresh_every": 1, "keep": "all"}
    if made["against"] == "each_other":
        wanted["mixture"] = None
    if sampler.restricts:
        wanted |= dataclasses.asdict(SamplerConfig())
    for setting, value in wanted.items():
        if setting in made and made[setting] != value:
            raise UserError(
                f"{what}, but {source.folder} was recorded with {setting}={made[setting]!r}, not {value!r}: {remedy} "
                "with this setting"
            )


def check_recorded_reference(
    config: JobConfig, loss: Callable[..., Any], source: DatasetConfig, cards: Sequence[Card], digest: str | None
) -> None:
    """Raises UserError if a dataset has the log-probs of another reference than the job's.

    Cards of earlier versions, and of datasets of your own, do not say whose log-probs these are: they are the
    reference, and another one must not be set beside them.

    Args:
      config: settings of the job.
      loss: its loss.
      source: the datasets.
      cards: their cards.
      digest: digest of the parameters of the job's reference; None if it has none.
    """
    if not any(REFERENCE_LOG_PROBS in card.fields for card in cards):
        return
    records = [made for card in cards for made in _records(card.provenance) if REFERENCE_DIGEST in made]
    recorded = {made[REFERENCE_DIGEST]: made[REFERENCE_PLACE] for made in records}
    if not recorded and config.reference is not None and not (_reads_fresh(loss) or reads_mismatched(loss)):
        raise UserError(f"{source.folder} has reference log-probs of its own: leave reference={config.reference!r} out")
    if digest is None or not has_reference(config, loss):
        return
    for other, place in recorded.items():
        if other != digest:
            raise UserError(
                f"{source.folder} has the log-probs of the reference {place} ({other[:12]}), but this job's reference "
                f"is {config.reference or config.start} ({digest[:12]}): set reference to that checkpoint, or train on "
                "examples without reference log-probs"
            )


def _records(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The provenance of each online record that a dataset's responses come from, with their log-probs."""
    if provenance.get("made_by") == "online":
        yield provenance
    elif provenance.get("made_by") in ("compose", "label"):
        for each in provenance.get("inputs", ()):
            yield from _records(each["provenance"])


def check_scores(config: JobConfig, loss: Callable[..., Any], cards: Sequence[Card], place: str) -> None:
    """Raises UserError, which names `place`, if the loss reads probabilities and the scores of a card are rewards."""
    if losses.PROBABILITIES in losses.reads(loss) and any(map(holds_rewards, cards)):
        raise UserError(
            f"the loss {config.loss.name} reads scores as probabilities, but the scores of {place} are rewards: label "
            "it anew with `alignment-gap data label --judge.labels=hard` (or soft), or choose another loss"
        )


def holds_rewards(card: Card) -> bool:
    """Whether no score of a dataset is the probability of a response.

    The card of an online record calls win rates among several samples, and chances to beat a mixture, "rewards" too,
    because two of them do not give the probability that one response beats the other. Each is still a probability.
    """
    made = card.provenance
    is_rate = made.get("made_by") == "online" and made.get(LABELS_OF_RECORD) in ("hard", "soft")
    return card.scores == REWARDS and not is_rate


def _check_own_samples(name: str, reads: Collection[str], source: SourceConfig | None) -> None:
    if isinstance(source, OnlineConfig) and losses.OWN_SAMPLES in reads:
        if source.refresh_every != 1:
            raise UserError(
                f"the loss {name} is only right for samples of the current policy, but refresh_every is "
                f"{source.refresh_every}: set it to 1, or choose a loss with an importance ratio, such as rloo"
            )
        if source.mixture is not None and source.against == "each_other":
            raise UserError(
                f"the loss {name} is only right for samples of the current policy: leave mixture={source.mixture} out, "
                "or set against to 'mixture', so that only the opponents are drawn from the mixture"
            )
        if source.sampler.restricts:
            raise UserError(
                f"the loss {name} is only right for samples of the current policy, but the sampler has a temperature, "
                "top_k or top_p: leave them out, or choose a loss with an importance ratio, such as rloo"
            )
    if isinstance(source, DatasetConfig) and losses.OWN_SAMPLES in reads and source.order != "recorded":
        raise UserError(
            f"the loss {name} is only right for samples of the current policy, but the order of {source.folder} is "
            f"{source.order!r}: give the record of an online run of {name} in order 'recorded', or train online"
        )
