"""Preparing datasets from text, and the paper's tasks for tensorflow-datasets and seqio."""
