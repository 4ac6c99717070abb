"""Backtracking over iterates, and Armijo's rule, on functions written down."""

import math

import pytest

from dhf.optim.line_search import armijo, backtrack, logarithmic_grid


@pytest.mark.parametrize(
    ("values", "best"),
    [([5.0, 4.0, 3.0], 2), ([3.0, 4.0, 5.0], 0), ([9.0, 2.0, 5.0, 6.0], 1), ([1.0, 8.0, 5.0], 2), ([1.0], 0)],
)
def test_backtracking_walks_down_from_the_last_iterate(values, best):
    assert backtrack(len(values), values.__getitem__) == (best, values[best])


def test_backtracking_leaves_a_non_finite_iterate():
    values = [2.0, 3.0, math.nan, math.inf]
    assert backtrack(4, values.__getitem__) == (0, 2.0)


def test_the_full_step_is_taken_where_it_serves():
    assert armijo(lambda s: (s - 1) ** 2, 1.0, -2.0) == (1.0, 0.0)


def test_the_step_is_halved_until_the_decrease_suffices():
    # f(s) = (4s - 1)² has its minimum at 1/4 and is 1 again at 1/2
    length, value = armijo(lambda s: (4 * s - 1) ** 2, 1.0, -8.0)
    assert (length, value) == (0.25, 0.0)


def test_no_step_serves_on_an_ascent():
    assert armijo(lambda s: 1.0 + s, 1.0, -1.0) == (0.0, 1.0)


def test_a_non_finite_value_is_not_taken():
    length, _ = armijo(lambda s: math.nan if s > 0.3 else 1 - s, 1.0, -1.0)
    assert length == 0.25


def test_near_convergence_rounding_does_not_refuse_a_step():
    # the decrease asked for is below rounding: equal is good enough, worse is not
    assert armijo(lambda s: 1.0, 1.0, -1e-17, tolerance=1e-15)[0] == 1.0
    assert armijo(lambda s: 1.0 + 1e-15, 1.0, -1e-17, tolerance=1e-14)[0] == 0.0
    # unless the caller knows that all of it is rounding
    assert armijo(lambda s: 1.0 + 1e-15, 1.0, -1e-17, tolerance=1e-14, slack=1e-14)[0] == 1.0


@pytest.mark.parametrize("best", [2.0**-9, 0.25, 0.5, 1.0, 2.0, 8.0])
def test_the_grid_finds_the_power_of_two_at_the_minimum(best):
    def f(s):
        return math.log2(s / best) ** 2

    assert logarithmic_grid(f, 1e3, f(1.0)) == (best, 0.0)


def test_the_grid_walks_past_values_that_are_above_the_start_or_not_finite():
    def f(s):
        return math.inf if s > 0.3 else 2.0 + s if s > 0.01 else 1.0 - s

    length, value = logarithmic_grid(f, 1.0, f(1.0))
    assert (length, value) == (2.0**-7, 1 - 2.0**-7)


def test_the_grid_stays_within_its_ends_and_refuses_an_ascent():
    assert logarithmic_grid(lambda s: -s, 0.0, -1.0) == (16.0, -16.0)
    assert logarithmic_grid(lambda s: 1 + s, 1.0, 2.0) == (0.0, 1.0)
