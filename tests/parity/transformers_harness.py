"""transformers' models with random parameters, and the logits of both libraries."""

import jax
import jax.numpy as jnp
import torch
import transformers
from transformers.models.gpt_neox import modeling_gpt_neox

from alignment_gap.models.policy import response_hidden


class OpenAssistantConfig(transformers.GPTNeoXConfig):
    """Of OpenAssistant's reward models: GPT-NeoX, and which hidden states the head reads."""

    model_type = "gpt_neox_reward_model"
    pooling: str = "last"


class GPTNeoXRewardModel(modeling_gpt_neox.GPTNeoXPreTrainedModel):
    """OpenAssistant's reward model, stated again: a linear map with a bias at the last token that is not masked."""

    config_class = OpenAssistantConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = transformers.GPTNeoXModel(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        hidden = self.gpt_neox(input_ids, attention_mask=attention_mask)[0]
        last = hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.out_proj(last))


transformers.AutoConfig.register("gpt_neox_reward_model", OpenAssistantConfig)
CLASSES = {
    "T5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "MT5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
    "Gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "Gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "Gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "Mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "Qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "GPTNeoX": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
    "T5Classifier": (transformers.T5Config, transformers.T5ForSequenceClassification),
    "MT5Classifier": (transformers.MT5Config, transformers.MT5ForSequenceClassification),
    "GemmaClassifier": (transformers.GemmaConfig, transformers.GemmaForSequenceClassification),
    "Gemma2Classifier": (transformers.Gemma2Config, transformers.Gemma2ForSequenceClassification),
    "Gemma3Classifier": (transformers.Gemma3TextConfig, transformers.Gemma3TextForSequenceClassification),
    "LlamaClassifier": (transformers.LlamaConfig, transformers.LlamaForSequenceClassification),
    "MistralClassifier": (transformers.MistralConfig, transformers.MistralForSequenceClassification),
    "Qwen2Classifier": (transformers.Qwen2Config, transformers.Qwen2ForSequenceClassification),
    "Qwen3Classifier": (transformers.Qwen3Config, transformers.Qwen3ForSequenceClassification),
    "GPTNeoXClassifier": (transformers.GPTNeoXConfig, transformers.GPTNeoXForSequenceClassification),
    "OpenAssistant": (OpenAssistantConfig, GPTNeoXRewardModel),
}


def random_model(family, settings, scale=0.1, seed=0):
    """A model in which no parameter has an initial value that hides it, such as a norm's weight of 1 or a bias of 0."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(seed)
    model = model_class._from_config(config_class(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape)
    return model


def reload(folder):
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model_class = getattr(transformers, name, None) or GPTNeoXRewardModel
    model, report = model_class.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def their_logits(model, prompt, response):
    """Logits [R, V] that predict the response's tokens, for one row without padding."""
    prompt, response = torch.tensor(prompt[None], dtype=torch.long), torch.tensor(response[None], dtype=torch.long)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            inputs = torch.cat([torch.zeros_like(response[:, :1]), response[:, :-1]], 1)
            return model(input_ids=prompt, decoder_input_ids=inputs).logits[0].numpy()
        logits = model(input_ids=torch.cat([prompt, response[:, :-1]], 1)).logits
        return logits[0, prompt.shape[1] - 1 :].numpy()


def their_rewards(model, texts, pad):
    """The score of each text, in one batch with padding on the right."""
    size = max(map(len, texts))
    rows = torch.tensor([[*text, *[pad] * (size - len(text))] for text in texts], dtype=torch.long)
    mask = torch.tensor([[1] * len(text) + [0] * (size - len(text)) for text in texts])
    with torch.no_grad():
        return model(input_ids=rows, attention_mask=mask).logits[:, 0].numpy()


def our_logits(policy, params, prompts, prompt_lengths, responses):
    """Logits [B, K, R, V] that predict the tokens of padded responses."""
    arrays = map(jnp.asarray, (prompts, prompt_lengths, responses))
    return jax.jit(lambda p, *a: policy.output(p).logits(response_hidden(policy, p, *a)))(params, *arrays)
