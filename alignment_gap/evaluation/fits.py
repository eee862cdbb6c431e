"""Over-optimisation curves of Gao et al. (arXiv 2210.10760): a score rises with the distance, and then falls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

# The term with b, for d = sqrt(KL): best-of-n has d(a - b d), reinforcement learning d(a - b log d).
CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"best_of_n": lambda d: d**2, "rl": lambda d: d * np.log(d)}


def fit(kl: Float[np.ndarray, "C"], gains: Float[np.ndarray, "R C"], curve: str) -> Float[np.ndarray, "R 2"]:
    """Least-squares fit of R rows of gains: d(a - b d) or d(a - b log d), d = sqrt(KL) (2210.10760).

    Args:
      kl: KL of C policies to the reference, in nats; policies at 0 nats do not affect the fit and are left out.
      gains: scores minus the reference's score, in any unit.
      curve: "best_of_n" or "rl".

    Returns:
      a and b for every row: a, and b of "rl", in score units per sqrt(nat); b of "best_of_n" in score units per nat.

    Raises:
      ValueError: there are fewer than two distances above 0, which do not determine a and b.
    """
    apart = kl > 0
    if len(np.unique(kl[apart])) < 2:
        raise ValueError("a fit needs policies at two distances or more")
    d = np.sqrt(kl[apart])
    design = np.stack([d, -CURVES[curve](d)], axis=1)
    return gains[:, apart] @ np.linalg.pinv(design).T
