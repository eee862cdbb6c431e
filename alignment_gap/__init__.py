"""Preference training of language models in JAX: online and offline through one sharded update step."""

__version__ = "0.1.0"
