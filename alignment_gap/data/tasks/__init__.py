"""Prepares datasets from text; the rubric of the built-in posts; tensorflow-datasets and seqio tasks."""
