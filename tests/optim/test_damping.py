"""Levenberg-Marquardt damping and the reduction ratio."""

import math

import pytest

from dhf.optim.damping import LevenbergMarquardt, reduction_ratio

EPS = 2.0**-52


def test_damping_follows_the_reduction_ratio():
    damping = LevenbergMarquardt(6.0)
    damping.update(0.9)
    assert damping.damping == 4.0
    damping.update(0.5)
    assert damping.damping == 4.0
    damping.update(0.1)
    assert damping.damping == 6.0
    damping.fail()
    assert damping.damping == 24.0


def test_an_unknown_ratio_leaves_damping_alone():
    damping = LevenbergMarquardt(1.0)
    damping.update(math.nan)
    assert damping.damping == 1.0


def test_damping_stays_within_bounds():
    damping = LevenbergMarquardt(1.0)
    for _ in range(200):
        damping.update(1.0)
    assert damping.damping == 1e-12
    for _ in range(200):
        damping.fail()
    assert damping.damping == 1e12


@pytest.mark.parametrize("damping", [0.0, -1.0, math.inf, math.nan])
def test_damping_must_be_positive_and_finite(damping):
    with pytest.raises(ValueError, match="positive and finite"):
        LevenbergMarquardt(damping)


def test_ratio_is_actual_over_predicted_decrease():
    assert reduction_ratio(10.0, 9.0, -2.0, EPS) == 0.5
    assert reduction_ratio(10.0, 11.0, -2.0, EPS) == -0.5


def test_ratio_is_one_where_both_vanish_in_rounding():
    assert reduction_ratio(1.0, 1.0 + 4 * EPS, -2 * EPS, EPS) == 1.0


def test_ratio_is_unknown_without_a_predicted_decrease():
    assert math.isnan(reduction_ratio(1.0, 0.5, 0.5, EPS))
    assert math.isnan(reduction_ratio(1.0, 1.0, 0.0, EPS))
    assert math.isnan(reduction_ratio(1.0, 0.5, math.nan, EPS))
