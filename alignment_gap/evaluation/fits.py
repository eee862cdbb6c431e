"""Over-optimisation curves of Gao et al. (arXiv 2210.10760): how far a score rises with the distance, and its fall."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

# What b is multiplied by, of d = sqrt(KL): best-of-n has d(a - b d), reinforcement learning d(a - b log d).
CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"best_of_n": lambda d: d**2, "rl": lambda d: d * np.log(d)}


def fit(kl: Float[np.ndarray, "C"], gains: Float[np.ndarray, "R C"], curve: str) -> Float[np.ndarray, "R 2"]:
    """Least squares of R rows of gains over the reference: d(a - b d) or d(a - b log d), d = sqrt(KL) (2210.10760).

    Args:
      kl: nats to the reference of C policies; those of 0 nats carry nothing and are left out.
      gains: scores minus the reference's, in any unit.
      curve: "best_of_n" or "rl".

    Returns:
      a and b of every row, in the unit of the scores per root nat and its like.

    Raises:
      ValueError: fewer than two distances leave a and b open.
    """
    apart = kl > 0
    if len(np.unique(kl[apart])) < 2:
        raise ValueError("a fit needs policies at two distances or more")
    d = np.sqrt(kl[apart])
    design = np.stack([d, -CURVES[curve](d)], axis=1)
    return gains[:, apart] @ np.linalg.pinv(design).T
