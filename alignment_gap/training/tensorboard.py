"""Metrics for TensorBoard, written by clu, which uses TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment_gap.errors import UserError


def check_tensorboard() -> None:
    """Raises UserError if clu or TensorFlow is not installed."""
    try:
        import clu.metric_writers  # noqa: F401
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"TensorBoard's files cannot be written ({error}): "
            'pip install "alignment-gap[tensorboard]", or leave monitor.tensorboard out'
        ) from error


def open_writer(folder: Path) -> Any:
    """A clu writer; hides the GPUs from TensorFlow, which would otherwise occupy them."""
    import tensorflow as tf
    from clu.metric_writers import SummaryWriter

    tf.config.set_visible_devices([], "GPU")
    return SummaryWriter(str(folder))
