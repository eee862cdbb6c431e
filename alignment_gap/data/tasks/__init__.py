"""Preparing datasets from text, the rubric of the built-in posts, and tensorflow-datasets and seqio tasks."""
