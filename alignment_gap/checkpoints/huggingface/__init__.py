"""Hugging Face's folders: config.json, safetensors in one file or several, and the tokenizer's files along with them.

Neither torch nor transformers is needed. T5 v1.1 (Flan-T5, mT5, ByT5) and, of the decoders, the text models of Gemma 1
to 3, Llama 3, Qwen 2 and 3 are read and written.
"""

from alignment_gap.checkpoints.huggingface.folder import open_foreign, recognises, write

__all__ = ["open_foreign", "recognises", "write"]
