"""The fits recover the coefficients of the curves that produced the points."""

import numpy as np
import pytest

from alignment_gap.evaluation.fits import fit

KL = np.array([0.0, 0.25, 1.0, 4.0, 9.0])


@pytest.mark.parametrize("curve", ["best_of_n", "rl"])
def test_coefficients_of_a_curve_are_found(curve):
    d = np.sqrt(KL[1:])
    bent = d**2 if curve == "best_of_n" else d * np.log(d)
    gains = np.stack([[0.0, *(0.5 * d - 0.1 * bent)], [0.0, *(0.2 * d + 0.3 * bent)]])
    np.testing.assert_allclose(fit(KL, gains, curve), [[0.5, 0.1], [0.2, -0.3]])


def test_scatter_is_averaged():
    rng = np.random.default_rng(0)
    kl = rng.uniform(0.1, 9, 400)
    d = np.sqrt(kl)
    noisy = 0.5 * d - 0.1 * d**2 + rng.normal(0, 0.05, 400)
    np.testing.assert_allclose(fit(kl, noisy[None], "best_of_n"), [[0.5, 0.1]], atol=0.01)


def test_one_distance_leaves_the_coefficients_open():
    with pytest.raises(ValueError, match="two distances"):
        fit(np.array([0.0, 1.0, 1.0]), np.zeros((1, 3)), "rl")
