"""Training in T5X with the losses of this library. It imports T5X and TensorFlow, which the rest does not need.

T5X is on no registry: put a checkout of it on PYTHONPATH, and with it airio and jestimator, which it imports.
"""

from alignment_gap.t5x.policy import EncoderDecoderPolicy

__all__ = ["EncoderDecoderPolicy"]
