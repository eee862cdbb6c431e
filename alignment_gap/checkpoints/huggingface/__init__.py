"""Hugging Face folders: config.json, safetensors in one or several files, and the tokenizer's files.

Needs neither torch nor transformers. Reads and writes T5 v1.1 (Flan-T5, mT5, ByT5), and these decoders: the text models
of Gemma 1 to 3, Llama 3, Mistral, Qwen 2 and 3, and GPT-NeoX (Pythia). Over all of these, also reward models: sequence
classification with one label.
"""

from alignment_gap.checkpoints.huggingface.folder import open_foreign, recognises, write

__all__ = ["open_foreign", "recognises", "write"]
