"""A tokenizer of single bytes, saved like that of a Hugging Face checkpoint, and a chat template for it."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

SPECIAL = {"<pad>": 0, "</s>": 1, "<s>": 2, "<unk>": 3}
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder, *, begins=True, ends=False, tokens=(), **names):
    """Makes a tokenizer of single bytes with special tokens, and saves it like that of a checkpoint."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = SPECIAL | {piece: index for index, piece in enumerate(alphabet, start=len(SPECIAL))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, *tokens])
    if begins or ends:
        template = ["<s>"] * begins + ["$A"] + ["</s>"] * ends
        special = [("<s>", 2), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(template), special_tokens=special)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "unk_token": "<unk>"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in named.items() if v}))
    return tokenizer
