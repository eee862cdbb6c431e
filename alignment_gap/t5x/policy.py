"""T5X's encoder-decoder as a policy: T5X trains it with any loss that a pair can serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import seqio
from flax import linen as nn
from jaxtyping import Array, Float, Int
from t5x import losses as t5x_losses
from t5x import metrics, models, optimizers

from alignment_gap import checks, losses
from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.data.batches.batch import length_mask
from alignment_gap.data.records.dataset import PROBABILITIES, REWARDS
from alignment_gap.data.tasks.seqio_tasks import PreferenceFeatureConverter, ReferenceFeatureConverter, preference_batch
from alignment_gap.errors import UserError
from alignment_gap.training import apply_loss, loss_inputs


class EncoderDecoderPolicy(models.EncoderDecoderModel):
    """T5X's EncoderDecoderModel, trained on pairs with a loss of `alignment_gap.losses`.

    Only the loss and the features differ from T5X's own model. So both read the same checkpoints, and T5X's
    `infer.py` and `eval.py` take `models.EncoderDecoderModel` with the same network.

    A loss with a reference reads the reference's log-probs from the Task, which has them for each token. T5X keeps no
    second network.
    """

    def __init__(
        self,
        module: nn.Module,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: optimizers.OptimizerDefType,
        loss: str | Callable[..., Any] = "ipo",
        loss_settings: Mapping[str, Any] | None = None,
        scores: str = PROBABILITIES,
        loss_normalizing_factor: float | None = None,
        **settings: Any,
    ):
        """The network with its loss.

        Args:
          module: the network, such as `t5x.examples.t5.network.Transformer`.
          input_vocabulary, output_vocabulary: of prompts and responses.
          optimizer_def: T5X's optimizer.
          loss: one of `losses.names()`, "module:function", or a callable.
          loss_settings: keyword-only parameters of the loss, such as {"beta": 0.1}.
          scores: what the Task's scores are: "probabilities" or "rewards", as a dataset's card says.
          loss_normalizing_factor: the sum of the prompts' losses is divided by it. T5X adds the gradients of
            microbatches, so give the batch size. None for the prompts of a microbatch.
          **settings: of `models.EncoderDecoderModel`, such as `decode_fn`.

        Raises:
          UserError: there is no such loss or setting, recorded pairs or their scores do not serve the loss, or the
            network has fewer tokens than the vocabulary.
        """
        try:
            self._loss = losses.get(loss, **(loss_settings or {}))
            self._reads = losses.reads(self._loss)
        except ValueError as error:
            raise UserError(str(error)) from error
        _check_served(self._loss, loss if isinstance(loss, str) else getattr(loss, "__name__", "given"))
        self.scores = scores
        checks.one_of(self, (PROBABILITIES, REWARDS), "scores")
        if scores == REWARDS and losses.PROBABILITIES in self._reads:
            raise UserError(
                f"scores is {scores!r}, but the loss reads scores as probabilities: label the pairs anew, or choose "
                "another loss"
            )
        tokens = getattr(getattr(module, "config", None), "vocab_size", None)
        if tokens is not None and tokens < output_vocabulary.vocab_size:
            raise UserError(
                f"vocab_size is {tokens}, but the vocabulary has {output_vocabulary.vocab_size} tokens: give as many"
            )
        has_reference = any(
            is_required and name.startswith("ref_") for name, is_required in losses.arrays(self._loss).items()
        )
        super().__init__(
            module=module,
            input_vocabulary=input_vocabulary,
            output_vocabulary=output_vocabulary,
            optimizer_def=optimizer_def,
            feature_converter_cls=ReferenceFeatureConverter if has_reference else PreferenceFeatureConverter,
            loss_normalizing_factor=loss_normalizing_factor,
            **settings,
        )

    def get_initial_variables(
        self,
        rng: Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> Any:
        """The network's initial variables, for the shapes of a batch of the feature converter."""
        shapes = {
            "encoder_input_tokens": input_shapes["prompt_tokens"],
            "decoder_input_tokens": input_shapes["chosen_tokens"],
        }
        return super().get_initial_variables(rng, shapes, dict.fromkeys(shapes, jnp.int32))

    def loss_fn(
        self, params: Any, batch: Mapping[str, Array], dropout_rng: Array | None
    ) -> tuple[Float[Array, ""], metrics.MetricsMap]:
        """The loss of a batch of the feature converter, and its metrics: means over prompts, and T5X's rates.

        Raises:
          UserError: the loss needs an array that a pair does not have.
        """
        pairs = preference_batch(batch)
        log_probs, collisions = self._score(params, pairs, dropout_rng)
        inputs = loss_inputs(pairs, log_probs, collisions, rewards=self.scores == REWARDS)
        found, diagnostics = apply_loss(self._loss, inputs)
        # A loss on single responses gives one value for each of them.
        of_prompts = found.reshape(len(found), -1).mean(axis=1)
        total, prompts = of_prompts.sum(), len(of_prompts)
        loss = total / (self._loss_normalizing_factor or prompts)
        means = {"loss": of_prompts} | diagnostics
        rates = {
            "timing/seqs_per_second": metrics.TimeRate.from_model_output(numerator=prompts),
            "timing/steps_per_second": metrics.StepsPerTime.from_model_output(),
            "timing/seconds": metrics.Time(),
        }
        return loss, {name: clu.metrics.Average.from_model_output(value) for name, value in means.items()} | rates

    def _score(
        self, params: Any, pairs: PreferenceBatch, dropout_rng: Array | None
    ) -> tuple[Float[Array, "B 2 R"], Float[Array, "B 2 R"] | None]:
        """Log-probs of all tokens, 0 at padding, and log sum_v pi(v)^2 where the loss reads it."""
        logits = self._response_logits(params, pairs.prompts, pairs.responses, dropout_rng)
        targets = jax.nn.one_hot(pairs.responses, logits.shape[-1], dtype=logits.dtype)
        # T5X's, whose gradient is made for a vocabulary that is sharded.
        log_probs = -t5x_losses.cross_entropy_with_logits(logits, targets, z_loss=0.0)[0]
        mask = length_mask(pairs.response_lengths, pairs.responses.shape[-1])
        if losses.LOG_COLLISIONS not in self._reads:
            return jnp.where(mask, log_probs, 0.0), None
        collisions = jax.nn.logsumexp(2 * jax.nn.log_softmax(jax.lax.stop_gradient(logits)), axis=-1)
        return jnp.where(mask, log_probs, 0.0), jnp.where(mask, collisions, 0.0)

    def _response_logits(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        responses: Int[Array, "B 2 R"],
        dropout_rng: Array | None,
    ) -> Float[Array, "B 2 R V"]:
        """Logits of the tokens of both responses; the prompt is encoded once."""
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        settings = {"enable_dropout": rngs is not None, "rngs": rngs}
        encoded = self.module.apply({"params": params}, prompts, method=self.module.encode, **settings)
        targets = responses.reshape(-1, responses.shape[-1])
        # A prompt's two responses stay next to each other, so that no device sends its rows to another.
        logits = self.module.apply(
            {"params": params},
            jnp.repeat(encoded, 2, axis=0),
            jnp.repeat(prompts, 2, axis=0),
            jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
            targets,
            method=self.module.decode,
            **settings,
        )
        return logits.reshape(*responses.shape, -1)


def _check_served(loss: Callable[..., Any], name: str) -> None:
    """Raises UserError where the loss reads more than recorded pairs and their reference."""
    samples = losses.reads(loss) & {losses.OWN_SAMPLES, losses.SAMPLER_LOG_PROBS}
    arrays = [each for each in losses.arrays(loss) if each.removeprefix("ref_") in ("fresh_logps", "kl_logps")]
    if samples or arrays:
        raise UserError(
            f"the loss {name} reads {', '.join(sorted(samples) or arrays)}, but T5X trains on recorded pairs: choose "
            "another loss, or train by alignment-gap train"
        )
