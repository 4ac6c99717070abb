"""Images of curves: through their points, by distance, in range."""

import numpy as np
import pytest
import torch

import dhf
from dhf.problems import build_problem
from dhf.problems.curves import draw_curves


def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
    points = np.random.default_rng(1).uniform(4.0, 24.0, (number, 3, 2))
    return points, draw_curves(points).reshape(number, 28, 28)


def test_a_pixel_is_shaded_by_its_distance_from_the_parabola():
    points, images = drawn(6)
    t = np.linspace(0, 1, 1001)[:, None]
    centres = np.stack(np.meshgrid(np.arange(28) + 0.5, np.arange(28) + 0.5), axis=-1)
    for (a, b, c), image in zip(points, images, strict=True):
        # the parabola from its values at 0, 1/2 and 1, in powers of t
        curve = a + (4 * b - 3 * a - c) * t + 2 * (a - 2 * b + c) * t**2
        distance = np.sqrt(((centres[:, :, None] - curve) ** 2).sum(-1)).min(-1)
        assert np.abs(image - np.clip(1.5 - distance, 0, 1)).max() < 0.04  # a segment's sagitta, and half a level


def test_the_curve_passes_through_its_points_and_stays_inside():
    points, images = drawn(500)
    for i in range(3):
        column, row = np.floor(points[:, i]).astype(int).T
        assert (images[np.arange(500), row, column] > 1.5 - np.sqrt(0.5) - 0.04).all()
    # the farthest a parabola gets from the box of its points: at t = 3/4 to x = 26.5, where the pen just fits
    image = draw_curves(np.array([[[4.0, 14.0], [24.0, 14.0], [24.0, 14.0]]])).reshape(28, 28)
    assert image[14, 26] == 1.0
    assert image[14, 27] == pytest.approx(1.5 - np.sqrt(1.25), abs=0.002)


def test_values_are_levels_of_a_byte():
    images = build_problem("curves-autoencoder", {"samples": 50}).train[0]
    assert (images.dtype, images.shape) == (torch.float32, (50, 784))
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    levels = images.double() * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0.0, atol=1e-4)
    assert 0.02 < float(images.mean()) < 0.15


def test_the_points_follow_the_seed_alone():
    first = build_problem("curves-autoencoder", {"samples": 20}).train[0]
    torch.manual_seed(5)
    again = build_problem("curves-autoencoder", {"samples": 10}).train[0]
    assert torch.equal(first[:10], again)
    other = build_problem("curves-autoencoder", {"samples": 10, "seed": 1}).train[0]
    assert not (other.unsqueeze(1) == first).all(2).any()


def test_points_may_coincide():
    (image,) = draw_curves(np.full((1, 3, 2), 10.5))
    assert np.isfinite(image).all()
    assert image.reshape(28, 28)[10, 10] == 1.0
    assert (image > 0).sum() == 9


def test_the_network_is_the_one_described():
    module = build_problem("curves-autoencoder", {"samples": 1}).objective.module
    layers = [m for m in module if isinstance(m, torch.nn.Linear)]
    widths = [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]
    assert [layers[0].in_features, *(m.out_features for m in layers)] == widths
    assert sum(p.numel() for p in module.parameters()) == 842_340


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 0}, "samples"),
        ({"samples": 2.5}, "samples"),
        ({"seed": -1}, "seed"),
        ({"connections": 0}, "connections"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(dhf.UsageError, match=f"{text} must be a whole number.*--options.{text}"):
        build_problem("curves-autoencoder", {"samples": 3, **options})
