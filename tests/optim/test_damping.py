"""The schedules of damping and radius, and the reduction ratio that they follow."""

import math

import pytest

from dhf import Reason
from dhf.optim.damping import LevenbergMarquardt, Nielsen, reduction_ratio
from dhf.optim.outcome import Outcome
from dhf.optim.trust_region import TrustRegion

EPS = 2.0**-52


def outcome(ratio: float, reason: Reason = Reason.RESIDUAL_TOLERANCE) -> Outcome:
    return Outcome(ratio, reason, 1.0)


# Levenberg-Marquardt


def test_damping_follows_the_reduction_ratio():
    damping = LevenbergMarquardt(6.0)
    for ratio, expected in ((0.9, 4.0), (0.5, 4.0), (0.1, 6.0), (math.nan, 6.0)):
        damping.accept(outcome(ratio))
        assert damping.damping == expected
    damping.fail(outcome(-1.0))
    assert damping.damping == 24.0


def test_negative_curvature_raises_the_damping_of_an_accepted_step():
    damping = LevenbergMarquardt(1.0)
    damping.accept(outcome(0.9, Reason.NEGATIVE_CURVATURE))
    assert damping.damping == 4.0


def test_damping_stays_within_bounds():
    damping = LevenbergMarquardt(1.0, smallest=1e-4)
    for _ in range(200):
        damping.accept(outcome(1.0))
    assert damping.damping == 1e-4
    for _ in range(200):
        damping.fail(outcome(-1.0))
    assert damping.damping == 1e12


@pytest.mark.parametrize("schedule", [LevenbergMarquardt, Nielsen])
@pytest.mark.parametrize("damping", [0.0, -1.0, math.inf, math.nan])
def test_damping_must_be_positive_and_finite(schedule, damping):
    with pytest.raises(ValueError, match="positive and finite"):
        schedule(damping)


# Nielsen


@pytest.mark.parametrize(
    ("ratio", "factor"), [(1.0, 1 / 3), (0.5, 1.0), (0.75, 1 - 0.125), (0.0, 2.0), (5.0, 1 / 3), (math.nan, 1.0)]
)
def test_nielsens_factor_is_his_cubic(ratio, factor):
    damping = Nielsen(2.0)
    damping.accept(outcome(ratio))
    assert damping.damping == pytest.approx(2.0 * factor, rel=1e-12)


def test_rejections_double_their_own_factor_until_a_step_is_taken():
    damping = Nielsen(1.0)
    seen = []
    for _ in range(4):
        damping.fail(outcome(-1.0))
        seen.append(damping.damping)
    assert seen == [2.0, 8.0, 64.0, 1024.0]
    damping.accept(outcome(0.5))
    damping.fail(outcome(-1.0))
    assert damping.damping == 2048.0


def test_damping_does_not_fall_where_the_solve_ran_out_of_iterations():
    damping = Nielsen(1.0)
    damping.accept(outcome(1.0, Reason.ITERATION_LIMIT))
    assert damping.damping == 1.0
    damping.accept(outcome(0.0, Reason.ITERATION_LIMIT))
    assert damping.damping == 2.0


# trust region


@pytest.mark.parametrize(
    ("ratio", "reason", "radius"),
    [
        (0.9, Reason.TRUST_REGION_BOUNDARY, 4.0),
        (0.9, Reason.RESIDUAL_TOLERANCE, 2.0),
        (0.5, Reason.TRUST_REGION_BOUNDARY, 2.0),
        (0.2, Reason.TRUST_REGION_BOUNDARY, 0.5),
        (math.nan, Reason.TRUST_REGION_BOUNDARY, 2.0),
    ],
)
def test_the_radius_follows_the_ratio_and_whether_it_bound_the_step(ratio, reason, radius):
    region = TrustRegion(2.0)
    region.accept(outcome(ratio, reason))
    assert region.radius == radius


def test_a_rejected_step_shrinks_the_region():
    region = TrustRegion(2.0)
    region.fail(outcome(-1.0))
    assert region.radius == 0.5


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_the_radius_must_be_positive_and_finite(radius):
    with pytest.raises(ValueError, match="positive and finite"):
        TrustRegion(radius)


@pytest.mark.parametrize("steering", [LevenbergMarquardt(3.0), Nielsen(3.0), TrustRegion(3.0)])
def test_steering_goes_on_from_its_state(steering):
    steering.fail(outcome(-1.0))
    state = steering.state_dict()
    steering.fail(outcome(-1.0))
    expected = steering.state_dict()
    steering.load_state_dict(state)
    steering.fail(outcome(-1.0))
    assert steering.state_dict() == expected


# the ratio


def test_ratio_is_actual_over_predicted_decrease():
    assert reduction_ratio(10.0, 9.0, -2.0, EPS) == 0.5
    assert reduction_ratio(10.0, 11.0, -2.0, EPS) == -0.5


def test_ratio_is_one_where_both_vanish_in_rounding():
    assert reduction_ratio(1.0, 1.0 + 4 * EPS, -2 * EPS, EPS) == 1.0


def test_ratio_is_unknown_without_a_predicted_decrease():
    assert math.isnan(reduction_ratio(1.0, 0.5, 0.5, EPS))
    assert math.isnan(reduction_ratio(1.0, 1.0, 0.0, EPS))
    assert math.isnan(reduction_ratio(1.0, 0.5, math.nan, EPS))
