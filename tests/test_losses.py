"""Losses: values and output Hessians against torch and autograd, counts, sampled labels, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian

import dhf
from dhf.losses import BinaryCrossEntropy, CrossEntropy, HalfSquaredNorm, MeanSquaredError, as_loss

N, C = 5, 4


def _real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _classes(*shape: int, ignored: int | None = None) -> Tensor:
    targets = torch.randint(0, C, shape)
    if ignored is not None:
        targets.view(-1)[1] = ignored
    return targets


_WEIGHT = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)

# name -> dhf's loss, torch's, outputs' shape, targets
CASES: dict[str, tuple[Any, Any, tuple[int, ...], Any]] = {
    "mse": (MeanSquaredError(), F.mse_loss, (N, C), lambda: _real(N, C)),
    "mse of vectors": (MeanSquaredError(), F.mse_loss, (N,), lambda: _real(N)),
    "mse of images": (MeanSquaredError(), F.mse_loss, (N, 2, 3), lambda: _real(N, 2, 3)),
    "half squares": (HalfSquaredNorm(), lambda z, _: 0.5 * z.square().sum() / N, (N, C), lambda: None),
    "bce": (
        BinaryCrossEntropy(),
        F.binary_cross_entropy_with_logits,
        (N, C),
        lambda: torch.rand(N, C, dtype=torch.float64),
    ),
    "bce, summed": (
        BinaryCrossEntropy("sum"),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum") / N,
        (N, C),
        lambda: torch.rand(N, C, dtype=torch.float64),
    ),
    "ce": (CrossEntropy(), F.cross_entropy, (N, C), lambda: _classes(N)),
    "ce of sequences": (CrossEntropy(), F.cross_entropy, (N, C, 3), lambda: _classes(N, 3)),
    "ce, ignored": (CrossEntropy(), F.cross_entropy, (N, C), lambda: _classes(N, ignored=-100)),
    "ce, ignored beyond the classes": (
        CrossEntropy(ignore_index=255),
        lambda z, y: F.cross_entropy(z, y, ignore_index=255),
        (N, C),
        lambda: _classes(N, ignored=255),
    ),
    "ce, weighted": (CrossEntropy(_WEIGHT), lambda z, y: F.cross_entropy(z, y, _WEIGHT), (N, C), lambda: _classes(N)),
    "ce, weighted and ignored": (
        CrossEntropy(_WEIGHT, ignore_index=2),
        lambda z, y: F.cross_entropy(z, y, _WEIGHT, ignore_index=2),
        (N, C, 3),
        lambda: _classes(N, 3, ignored=2),
    ),
    "ce, weighted and ignored beyond the classes": (
        CrossEntropy(_WEIGHT, ignore_index=255),
        lambda z, y: F.cross_entropy(z, y, _WEIGHT, ignore_index=255),
        (N, C),
        lambda: _classes(N, ignored=255),
    ),
    "ce, smoothed": (
        CrossEntropy(label_smoothing=0.2),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
        (N, C),
        lambda: _classes(N, ignored=-100),
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_value_and_output_hessian(case: str) -> None:
    loss, torch_loss, shape, targets = CASES[case]
    z, y, u = _real(*shape), targets(), _real(*shape)
    if y is not None:
        loss.check(z, y)
    torch.testing.assert_close(loss(z, y), torch_loss(z, y), rtol=1e-13, atol=0)
    H = hessian(lambda outputs: torch_loss(outputs, y), z).reshape(z.numel(), z.numel())
    torch.testing.assert_close(loss.hessian(z, y)(u).reshape(-1), H @ u.reshape(-1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in CASES if c != "half squares"])
def test_counts_join_parts_to_the_mean_of_the_whole(case: str) -> None:
    loss, _, shape, targets = CASES[case]
    z, y = _real(*shape), targets()
    parts = [(z[:2], y[:2]), (z[2:], y[2:])]
    weights = [loss.count(b) for _, b in parts]
    joined = sum(w * loss(a, b) for w, (a, b) in zip(weights, parts, strict=True)) / sum(weights)
    torch.testing.assert_close(joined, loss(z, y), rtol=1e-13, atol=0)
    assert loss.count(y) == pytest.approx(sum(weights), rel=1e-14)


def test_counts_of_cross_entropy() -> None:
    targets = torch.tensor([0, 3, -100, 1])
    assert CrossEntropy().count(targets) == 3
    assert CrossEntropy(ignore_index=1).count(torch.tensor([0, 3, 1, 1])) == 2
    assert CrossEntropy(_WEIGHT).count(targets) == 0.5 + 4.0 + 1.0
    assert CrossEntropy().count(torch.full((3,), -100)) == 0


def test_nll_counts_what_it_averages() -> None:
    loss = as_loss(nn.NLLLoss())
    log_p, y = torch.log_softmax(_real(N, C), 1), torch.tensor([-100, -100, 1, 2, 3])
    joined = (loss.count(y[:3]) * loss(log_p[:3], y[:3]) + loss.count(y[3:]) * loss(log_p[3:], y[3:])) / loss.count(y)
    torch.testing.assert_close(joined, loss(log_p, y))


# sampled labels


@pytest.mark.parametrize(
    "case", ["mse", "mse of vectors", "half squares", "bce", "bce, summed", "ce", "ce of sequences", "ce, ignored"]
)
def test_sampled_gradients_have_the_output_hessian_as_second_moment(case: str) -> None:
    loss, _, shape, targets = CASES[case]
    z, y = _real(*shape), targets()
    rows = 40_000
    uniforms = torch.rand(rows, loss.draws(z), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    one, label = z[:1], None if y is None else y[:1]
    repeated = one.expand(rows, *one.shape[1:])
    c = loss.sampled_gradients(repeated, None if label is None else label.expand(rows, *label.shape[1:]), uniforms)
    assert c.shape == repeated.shape
    u = _real(*one.shape)
    products = (c * loss.inner(c, u.expand_as(c))).reshape(rows, -1)
    expected = (loss.hessian(one, label)(u) * (1 if label is None else loss.count(label))).reshape(-1)
    standard_error = products.std(0) / math.sqrt(rows)
    assert ((products.mean(0) - expected).abs() <= 5 * standard_error + 1e-12).all()


def test_sampled_classes_have_the_softmax_probabilities() -> None:
    z = torch.tensor([[0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)
    grid = ((torch.arange(10_000) + 0.5) / 10_000).double().unsqueeze(1)
    c = CrossEntropy().sampled_gradients(z.expand(10_000, -1), torch.zeros(10_000, dtype=torch.long), grid)
    frequency = (c < 0).double().mean(0)
    torch.testing.assert_close(frequency, torch.softmax(z[0], 0), rtol=0, atol=2e-4)


def test_weighted_cross_entropy_has_no_labels_to_draw() -> None:
    assert CrossEntropy(_WEIGHT).draws(_real(N, C)) is None


# recognition and refusal


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (nn.MSELoss(), MeanSquaredError),
        (F.mse_loss, MeanSquaredError),
        (nn.CrossEntropyLoss(), CrossEntropy),
        (F.cross_entropy, CrossEntropy),
        (nn.BCEWithLogitsLoss(), BinaryCrossEntropy),
        (F.binary_cross_entropy_with_logits, BinaryCrossEntropy),
        (MeanSquaredError(), MeanSquaredError),
        (None, type(None)),
        (lambda z, batch: z.mean(), type(None)),
    ],
)
def test_losses_are_recognised(given: Any, kind: type) -> None:
    assert type(as_loss(given)) is kind


@pytest.mark.parametrize(
    "given", [nn.L1Loss(), nn.SmoothL1Loss(), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0, dtype=torch.float64))]
)
def test_other_torch_losses_are_left_to_autograd(given: nn.Module) -> None:
    loss = as_loss(given)
    z, y = _real(N, C), torch.rand(N, C, dtype=torch.float64)
    assert loss(z, y) == given(z, y)
    assert loss.count(y) == N
    assert loss.hessian(z, y) is None
    assert loss.draws(z) is None


def test_options_of_the_torch_module_are_kept() -> None:
    given = nn.CrossEntropyLoss(_WEIGHT, ignore_index=2)
    z, y = _real(N, C), _classes(N)
    assert as_loss(given)(z, y) == given(z, y)
    assert as_loss(given).count(y) == float(_WEIGHT[y[y != 2]].sum())


@pytest.mark.parametrize("kind", [nn.MSELoss, nn.CrossEntropyLoss, nn.L1Loss])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_other_than_the_mean_are_refused(kind: type, reduction: str) -> None:
    with pytest.raises(dhf.UsageError, match=f"{kind.__name__} has reduction='{reduction}'.*reduction='mean'"):
        as_loss(kind(reduction=reduction))


def test_losses_that_are_no_weighted_mean_are_refused() -> None:
    with pytest.raises(dhf.UsageError, match="both class weights and label smoothing"):
        as_loss(nn.CrossEntropyLoss(_WEIGHT, label_smoothing=0.1))
    with pytest.raises(dhf.UsageError, match="NLLLoss with class weights"):
        as_loss(nn.NLLLoss(_WEIGHT))
    with pytest.raises(ValueError, match="components must be 'mean' or 'sum', got 'max'"):
        BinaryCrossEntropy("max")


@pytest.mark.parametrize(
    ("loss", "targets", "words"),
    [
        (MeanSquaredError(), torch.zeros(N), r"shape \(5, 4\) and targets \(5,\)"),
        (BinaryCrossEntropy(), torch.full((N, C), 1.5), r"in \[0, 1\], found 1.5 to 1.5"),
        (BinaryCrossEntropy(), torch.full((N, C), -0.5), r"found -0.5 to -0.5"),
        (BinaryCrossEntropy(), torch.full((N, C), math.nan), "found nan to nan"),
        (CrossEntropy(), torch.zeros(N, C), r"class indices of shape \(5,\), got torch.float32 of shape \(5, 4\)"),
        (CrossEntropy(), torch.zeros(N, 1, dtype=torch.long), r"got torch.int64 of shape \(5, 1\)"),
        (CrossEntropy(), torch.tensor([0, 1, 4, 0, 0]), "target 4 of sample 2 .* 4 classes.*0 to 3"),
        (CrossEntropy(ignore_index=9), torch.tensor([9, 9, 0, -100, 0]), "target -100 of sample 3"),
    ],
)
def test_targets_that_do_not_fit(loss: Any, targets: Tensor, words: str) -> None:
    with pytest.raises(dhf.UsageError, match=words):
        loss.check(torch.zeros(N, C), targets)


def test_integer_targets_of_binary_cross_entropy_are_refused() -> None:
    with pytest.raises(dhf.UsageError, match=r"floating-point targets, got torch.int64; use targets.float\(\)"):
        dhf.BinaryCrossEntropy().check(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.int64))
