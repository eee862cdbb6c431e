"""Metrics for TensorBoard, written by clu, which writes them with TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment_gap.errors import UserError


def check_tensorboard() -> None:
    """Raises UserError if what writes for TensorBoard is not installed."""
    try:
        import clu.metric_writers  # noqa: F401
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"TensorBoard's files cannot be written ({error}): "
            'pip install "alignment-gap[tensorboard]", or leave monitor.tensorboard out'
        ) from error


def open_writer(folder: Path) -> Any:
    """A writer of clu's; TensorFlow is kept from the accelerators, which it would take for itself."""
    import tensorflow as tf
    from clu.metric_writers import SummaryWriter

    tf.config.set_visible_devices([], "GPU")
    return SummaryWriter(str(folder))
