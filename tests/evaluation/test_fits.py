"""The fits recover the coefficients of curves that they were drawn from, and best-of-n's KL is that of its formula."""

import numpy as np
import pytest

from alignment_gap.evaluation.fits import best_of_n_kl, fit

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


def test_the_kl_of_the_best_of_n():
    """By enumeration: over n equally likely ranks of a large pool, the best of two has density 2 r."""
    np.testing.assert_allclose(best_of_n_kl(np.array([1.0, 2.0, 4.0])), [0.0, np.log(2) - 0.5, np.log(4) - 0.75])
    ranks = (np.arange(100_000) + 0.5) / 100_000
    density = 2 * ranks
    assert np.mean(density * np.log(density)) == pytest.approx(best_of_n_kl(np.array(2.0)), abs=1e-4)
