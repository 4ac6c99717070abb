"""Images of smooth curves: a deep autoencoder on data with six true degrees of freedom, made up here."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from dhf.problems.autoencoder import autoencoder_problem
from dhf.problems.options import require_whole
from dhf.problems.problem import Problem

__all__ = ["autoencoder", "draw_curves"]

_SIDE = 28
_WIDTHS = (_SIDE * _SIDE, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, _SIDE * _SIDE)
_MARGIN = 4.0
_PEN = 2.0
_SEGMENTS = 24


def autoencoder(samples: int = 2000, seed: int = 0, connections: int = 15) -> Problem:
    """A deep autoencoder of curves, 784-400-200-100-50-25-6-25-50-100-200-400-784 with sigmoid hidden units.

    Each image shows one curve of :func:`draw_curves` through three points drawn evenly from the inner 20x20 of its 28x28
    pixels; six numbers make an image, and the code has six units. Loss, metric and picture are those of
    :func:`~dhf.problems.autoencoder.autoencoder_problem`.

    Args:
        samples: Images; 20,000 in the papers.
        seed: Names the points.
        connections: Incoming weights per unit that are not zero at the start.

    Raises:
        UsageError: If an option is out of range.

    Source: the network and the kind of data are those of Hinton & Salakhutdinov (2006) and Martens (2010); their images
    were drawn by another program.
    """
    require_whole(1, samples=samples)
    require_whole(0, seed=seed)
    points = np.random.default_rng(seed).uniform(_MARGIN, _SIDE - _MARGIN, (samples, 3, 2))
    return autoencoder_problem(_WIDTHS, torch.from_numpy(draw_curves(points)), connections)


def draw_curves(points: np.ndarray) -> np.ndarray:
    """Images of the parabolas ``p(t)``, 0 ≤ t ≤ 1, with ``p(0)``, ``p(½)``, ``p(1)`` the three points given.

    A pixel at distance d of the curve has the value ``1.5 - d`` within [0, 1]: a pen two pixels wide whose edge falls off
    over one pixel. Values are whole multiples of 1/255, as in stored images, so that none is tiny. The parabola leaves the
    box of its points by at most an eighth of its side, and so never leaves the image.

    Args:
        points: Shape (N, 3, 2), x and y in pixels from the upper left corner; pixel (row, column) is centred at
            (column + ½, row + ½).

    Returns:
        float32, shape (N, 784), row by row.
    """
    t = np.linspace(0.0, 1.0, _SEGMENTS + 1)
    basis = np.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)])
    images = np.empty((len(points), _SIDE * _SIDE), np.float32)
    for i in range(0, len(points), 500):
        curves = np.einsum("npc,pt->tcn", points[i : i + 500], basis)[..., None]
        inked = np.clip(0.5 + _PEN / 2 - np.sqrt(_squared_distance(curves)), 0.0, 1.0)
        images[i : i + 500] = np.rint(255 * inked) / 255
    return images


def _squared_distance(curves: np.ndarray) -> np.ndarray:
    """From every pixel's centre to polygons of shape (vertices, 2, N, 1): shape (N, 784), in squared pixels."""
    row, column = np.divmod(np.arange(_SIDE * _SIDE), _SIDE)
    x, y = column + 0.5, row + 0.5
    nearest = np.full((curves.shape[2], _SIDE * _SIDE), np.inf)
    for (x0, y0), (x1, y1) in itertools.pairwise(curves):
        dx, dy = x1 - x0, y1 - y0
        length = np.maximum(dx * dx + dy * dy, 1e-12)  # points may coincide
        along = np.clip((x - x0) * (dx / length) + (y - y0) * (dy / length), 0.0, 1.0)
        np.minimum(nearest, (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2, out=nearest)
    return nearest
