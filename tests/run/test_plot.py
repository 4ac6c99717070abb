"""Pictures: the numbers in their axes are those of the metrics; their colours can be read. No pixel is compared."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dhf.errors import UsageError
from dhf.run.plot import draw_overview, draw_profile, draw_residuals
from dhf.run.records import RunRecord
from dhf.run.spectrum import draw_spectrum, read_spectrum
from dhf.run.theme import DARK, LIGHT, THEMES

REASONS = ["RESIDUAL_TOLERANCE", "ITERATION_LIMIT", "NEGATIVE_CURVATURE"]


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "phase": 1,
        "optimizer": "hf",
        "loss": 100.0 * 0.5 ** (step - 1),
        "loss_after": 100.0 * 0.5**step,
        "seconds": 0.25 * step,
        "gradient_equivalents": 3.0 * step,
        "damping": 10.0**-step,
        "reduction_ratio": -5.0 if step == 3 else 0.9,
        "cg_iterations": 2 * step,
        "cg_reason": REASONS[step % 3],
        "radius": None,
        **more,
    }


def record(rows: list[dict[str, Any]], name: str = "first", solves: list[dict[str, Any]] | None = None) -> RunRecord:
    return RunRecord(Path(name), name, {"problem": "mine"}, rows, {"world_size": 2}, solves or [])


def lines(axis: Any, gid: str = "data") -> list[Any]:
    return [line for line in axis.lines if line.get_gid() == gid]


def assert_line(line: Any, x: list[float], y: list[float | None]) -> None:
    np.testing.assert_array_equal(line.get_xdata(), x)
    np.testing.assert_array_equal(np.asarray(line.get_ydata(), float), [math.nan if v is None else v for v in y])


def test_an_overview_has_the_numbers_of_the_metrics() -> None:
    rows = [row(step) for step in range(1, 7)]
    figure = draw_overview([record(rows)], LIGHT)
    time, steps, cost, iterations, damping, ratio = figure.axes
    losses = [rows[0]["loss"], *(r["loss_after"] for r in rows)]
    assert_line(lines(time)[0], [0.0, *np.cumsum([r["seconds"] for r in rows])], losses)
    assert_line(lines(steps)[0], [0, 1, 2, 3, 4, 5, 6], losses)
    assert_line(lines(cost)[0], [0.0, *np.cumsum([r["gradient_equivalents"] for r in rows])], losses)
    assert [axis.get_yscale() for axis in (time, steps, cost, damping)] == ["log"] * 4
    assert_line(lines(iterations)[0], [1, 2, 3, 4, 5, 6], [r["cg_iterations"] for r in rows])
    assert_line(lines(damping)[0], [1, 2, 3, 4, 5, 6], [r["damping"] for r in rows])
    assert_line(lines(ratio)[0], [1, 2, 3, 4, 5, 6], [r["reduction_ratio"] for r in rows])
    for axis in figure.axes:
        assert axis.get_xlabel()
        assert axis.get_ylabel()
    assert time.get_xlabel() == "time in steps (seconds)"


def test_the_reason_of_each_solve_is_at_its_place() -> None:
    rows = [row(step) for step in range(1, 7)]
    axis = draw_overview([record(rows)], DARK).axes[3]
    marks = set()
    for reason in REASONS:
        (found,) = lines(axis, f"reason {reason}")
        expected = [(r["step"], r["cg_iterations"]) for r in rows if r["cg_reason"] == reason]
        assert list(zip(found.get_xdata(), found.get_ydata(), strict=True)) == expected
        marks.add(found.get_marker())
    assert len(marks) == 3
    shown = {text.get_text() for text in axis.get_legend().get_texts()}
    assert shown == {"residual tolerance", "iteration limit", "negative curvature"}


def test_a_ratio_out_of_sight_is_marked_at_the_edge() -> None:
    axis = draw_overview([record([row(step) for step in range(1, 7)])], LIGHT).axes[5]
    (mark,) = lines(axis, "beyond")
    assert_line(mark, [3], [axis.get_ylim()[0]])
    assert axis.get_ylim()[0] > -5.0


def test_runs_are_laid_over_one_another_in_their_own_colours() -> None:
    first, second = record([row(step) for step in range(1, 5)]), record([row(step) for step in range(1, 61)], "second")
    figure = draw_overview([first, second], LIGHT)
    for axis in figure.axes[:3]:
        one, two = lines(axis)
        assert (one.get_label(), two.get_label()) == ("first", "second")
        assert one.get_color() != two.get_color()
        assert one.get_linestyle() != two.get_linestyle() or one._unscaled_dash_pattern != two._unscaled_dash_pattern
        assert len(one.get_xdata()) == 5
        assert len(two.get_xdata()) == 61
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    assert [axis.get_xscale() for axis in figure.axes[:3]] == ["log"] * 3  # 15 times as long


def test_first_order_runs_have_no_panels_of_solves_and_old_ones_no_cost() -> None:
    adam = [row(step, optimizer="adam", cg_reason=None, cg_iterations=0, damping=0.0) for step in range(1, 5)]
    assert len(draw_overview([record(adam)], LIGHT).axes) == 3
    old = [{key: value for key, value in r.items() if key != "gradient_equivalents"} for r in adam]
    assert len(draw_overview([record(old)], LIGHT).axes) == 2
    both = draw_overview([record(adam), record([row(step) for step in range(1, 5)])], LIGHT)
    assert len(both.axes) == 6
    assert np.isnan(lines(both.axes[3])[0].get_ydata()).all()


def test_a_trust_region_shows_its_radius() -> None:
    figure = draw_overview([record([row(step, damping=0.0, radius=2.0**step) for step in range(1, 5)])], LIGHT)
    assert figure.axes[4].get_ylabel() == "trust-region radius"
    assert_line(lines(figure.axes[4])[0], [1, 2, 3, 4], [2.0, 4.0, 8.0, 16.0])


def test_held_out_losses_and_phases_are_shown_for_one_run() -> None:
    rows = [row(step, validation_loss=3.0 + step) for step in range(1, 5)]
    rows = [dict(r, phase=1 if r["step"] < 3 else 2, optimizer="adam" if r["step"] < 3 else "hf") for r in rows]
    axis = draw_overview([record(rows)], LIGHT).axes[1]
    assert_line(lines(axis)[1], [1, 2, 3, 4], [4.0, 5.0, 6.0, 7.0])
    assert [text.get_text().strip() for text in axis.texts] == ["adam", "hf"]
    assert [line.get_xdata()[0] for line in axis.lines if line.get_gid() is None] == [2]


def solve(step: int, true: float | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "reason": "RESIDUAL_TOLERANCE",
        "iterations": 2,
        "right_hand_side_norm": 8.0,
        "true_residual_norm": true,
        "iteration": [0, 1, 2],
        "residual_norm": [8.0, None, 0.5],
    }


def test_residuals_are_relative_and_the_true_one_stands_at_the_end() -> None:
    run = record([row(1)], solves=[solve(1), solve(5, true=0.75)])
    figure = draw_residuals([run], LIGHT)
    assert figure is not None
    one, two = lines(figure.axes[0], "residual")
    assert_line(one, [0, 1, 2], [1.0, None, 0.0625])
    assert two.get_label() == "step 5: residual tolerance"
    (true,) = lines(figure.axes[0], "true")
    assert_line(true, [2], [0.09375])
    chosen = draw_residuals([run], LIGHT, [5])
    assert chosen is not None
    assert len(lines(chosen.axes[0], "residual")) == 1
    assert draw_residuals([run], LIGHT, [7]) is None
    assert draw_residuals([record([row(1)])], LIGHT) is None


def test_a_profile_is_the_mean_over_steps_and_ranks() -> None:
    seconds = [{"graphs": [1.0, 3.0], "products": [4.0, 4.0]}, {"graphs": [2.0, 2.0], "products": [0.0, 4.0]}]
    run = record([row(i, phase_seconds=found) for i, found in enumerate(seconds, 1)])
    figure = draw_profile([run], LIGHT)
    assert figure is not None
    assert [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches] == [(0.0, 2.0), (2.0, 3.0)]
    assert draw_profile([record([row(1)])], LIGHT) is None


def test_a_spectrum_shows_its_density_and_its_eigenvalues(tmp_path: Path) -> None:
    content = {"eigenvalues": [3.0, -5.0, 0.5], "density": {"grid": [-5.0, 0.0, 5.0], "values": [0.1, 2.0, 0.0]}}
    path = tmp_path / "spectrum.json"
    path.write_text(json.dumps({**content, "dtype": "float64"}))
    density, ranked = draw_spectrum(read_spectrum(path), DARK).axes
    assert_line(lines(density, "density")[0], [-5.0, 0.0, 5.0], [0.1, 2.0, None])
    assert list(lines(density, "rug")[0].get_xdata()) == [3.0, -5.0, 0.5]
    assert_line(lines(ranked, "positive")[0], [2, 3], [3.0, 0.5])
    assert_line(lines(ranked, "negative")[0], [1], [5.0])
    for key in content:
        path.write_text(json.dumps({key: content[key]}))
        assert len(draw_spectrum(read_spectrum(path), LIGHT).axes) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ('{"loss": 1}', "holds no spectrum: it needs eigenvalues, or a density with grid and values"),
        ('{"density": {"grid": [1, 2]}}', "density must have grid and values"),
        ('{"density": {"grid": [1, 2], "values": [1]}}', "density has 2 grid points and 1 values"),
        ('{"eigenvalues": [1, NaN]}', "eigenvalues must be a list of numbers"),
    ],
)
def test_what_is_no_spectrum_is_refused(tmp_path: Path, content: str | None, text: str) -> None:
    path = tmp_path / "spectrum.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=text):
        read_spectrum(path)


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# linear RGB as it is seen without one kind of cone, Viénot, Brettel & Mollon (1999), and Machado et al. (2009) for tritanopia
BLIND = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


def seen(colour: str, matrix: Any) -> Any:
    """CIE L*a*b* of a colour as it is seen."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colours_stand_out_from_their_ground_and_from_one_another(theme: Any) -> None:
    assert contrast(theme.text, theme.ground) >= 7
    assert contrast(theme.quiet, theme.ground) >= 4.5
    for colour in theme.colours:
        assert contrast(colour, theme.ground) >= 3, colour
    # the first four, by which most comparisons are drawn, for those who lack a kind of cone as well; dashes differ, too
    for matrix in (np.eye(3), *BLIND.values()):
        for i in range(4):
            for j in range(i):
                apart = np.linalg.norm(seen(theme.colours[i], matrix) - seen(theme.colours[j], matrix))
                assert apart >= 10, (theme.name, theme.colours[i], theme.colours[j], apart)


def test_a_theme_reaches_figures_that_are_made_under_it() -> None:
    from matplotlib.colors import same_color

    for theme in (LIGHT, DARK):
        with theme.applied("svg"):
            figure = draw_overview([record([row(1), row(2)])], theme)
            assert same_color(figure.get_facecolor(), theme.ground)
            assert same_color(figure.axes[0].xaxis.label.get_color(), theme.text)


def test_a_run_that_goes_on_says_so() -> None:
    run = dataclasses.replace(record([row(1)]), result=None)
    assert draw_overview([run], LIGHT).get_suptitle() == "mine (not ended)"
