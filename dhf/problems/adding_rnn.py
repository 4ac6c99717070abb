"""The adding problem: a recurrent network that must keep two numbers over many time steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dhf.errors import UsageError
from dhf.losses import MeanSquaredError
from dhf.objective import Objective
from dhf.problems.options import require_whole
from dhf.problems.problem import Problem, match_module

__all__ = ["AddingSequences", "TanhRNN", "adding_rnn", "draw_sequences"]

_HELD_OUT = 1000
_TOLERANCE = 0.04
_CONNECTIONS = 15
_SPECTRAL_RADIUS = 1.1
_INPUT_SCALE, _OUTPUT_SCALE = 0.1, 0.1


def adding_rnn(length: int = 50, hidden: int = 100, samples: int = 10_000, seed: int = 0) -> Problem:
    """A tanh network that reads two inputs a time step and gives, at the end, the sum of the two marked values.

    The loss is the mean squared error; a guess of 1 for every sequence has 1/6. With a ``--batch-size`` below ``samples`` each
    step draws new sequences, named by ``--seed``, the step and their index: the same ones on any number of ranks and after a
    resume. Without it the ``samples`` sequences are drawn once. The metrics are taken on 1,000 held-out sequences, which
    are also the validation data: ``mse``, and ``error_rate``, the share whose error exceeds 0.04.

    Args:
        length: Time steps of a sequence, at least 10.
        hidden: Units of the state.
        samples: Sequences in an epoch.
        seed: Names the held-out sequences.

    Raises:
        UsageError: If an option is out of range.

    Source: Hochreiter & Schmidhuber (1997), experiment 4, in the form of Martens & Sutskever, "Learning recurrent neural
    networks with Hessian-free optimization" (2011): values from [0, 1], one length, plain sums.
    """
    require_whole(10, length=length)
    require_whole(1, hidden=hidden, samples=samples)
    require_whole(0, seed=seed)
    held_out = draw_sequences(_HELD_OUT, length, torch.Generator().manual_seed(seed))

    def metrics(module: torch.nn.Module) -> dict[str, float]:
        with torch.no_grad():
            guesses = module(match_module(held_out[0], module)).cpu().double()
        error = guesses - held_out[1]
        return {"mse": float(error.square().mean()), "error_rate": float((error.abs() > _TOLERANCE).double().mean())}

    return Problem(
        Objective(TanhRNN(2, hidden, 1), MeanSquaredError()),
        AddingSequences(samples, length),
        validation=held_out,
        metrics=metrics,
    )


class TanhRNN(torch.nn.Module):
    """``h_t = tanh(W h_{t-1} + U x_t + b)`` from ``h_0 = 0``, and a linear read-out of the last state.

    It starts with 15 weights N(0, 1) into each unit of W, W scaled to a spectral radius of 1.1, the entries of U and of the
    read-out from N(0, 0.1²), b = 0, and the read-out's bias at 1, the mean of the adding problem's targets.

    Args:
        inputs: Components of x.
        hidden: Components of h.
        outputs: Components of what is read out.

    Source: Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep learning" (2013),
    section 4; there the scale of U is chosen for each problem. From N(0, 1) training does not get off the ground here.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.into = torch.nn.Linear(inputs, hidden)
        self.across = torch.nn.Linear(hidden, hidden, bias=False)
        self.out = torch.nn.Linear(hidden, outputs)
        with torch.no_grad():
            self.into.weight.normal_(0.0, _INPUT_SCALE)
            self.into.bias.zero_()
            self.across.weight.copy_(_sparse_recurrence(hidden))
            self.out.weight.normal_(0.0, _OUTPUT_SCALE)
            self.out.bias.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape (N, outputs) for sequences of shape (N, time, inputs)."""
        driven = self.into(x.transpose(0, 1))
        h = torch.tanh(driven[0])
        for term in driven[1:]:
            h = torch.tanh(self.across(h) + term)
        return self.out(h)


class AddingSequences(Dataset[tuple[Tensor, Tensor]]):
    """So many sequences with their sums, each drawn from torch's global generator when it is asked for.

    Args:
        samples: Its length.
        length: Time steps of a sequence.
    """

    def __init__(self, samples: int, length: int) -> None:
        self._samples, self._length = samples, length

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -self._samples <= index < self._samples:
            raise IndexError(f"sample {index} of {self._samples}")
        x, y = draw_sequences(1, self._length)
        return x[0], y[0]


def draw_sequences(number: int, length: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Sequences of a value from [0, 1) and a marker at each time step, with the sum of the two values marked 1.

    One marked step is in the first tenth of the sequence, the other between there and its middle; both are drawn evenly.
    (Martens & Sutskever and Hochreiter & Schmidhuber let the second one be anywhere in the first half that is not yet marked.)

    Args:
        number: How many.
        length: Time steps, at least 10.
        generator: What draws; torch's global one by default.

    Returns:
        float64 tensors of shape (number, length, 2) and (number, 1).
    """
    if length < 10:
        raise UsageError(f"a sequence needs a length of at least 10 for its first tenth, got {length}")
    tenth, half = length // 10, length // 2
    x = torch.zeros(number, length, 2, dtype=torch.float64)
    x[:, :, 0] = torch.rand(number, length, generator=generator, dtype=torch.float64)
    every = torch.arange(number)
    first = torch.randint(tenth, (number,), generator=generator)
    second = torch.randint(tenth, half, (number,), generator=generator)
    x[every, first, 1] = x[every, second, 1] = 1.0
    return x, x[every, first, :1] + x[every, second, :1]


def _sparse_recurrence(hidden: int) -> Tensor:
    """Shape (hidden, hidden): up to 15 entries a row are not zero, and the spectral radius is 1.1."""
    weight = torch.zeros(hidden, hidden)
    for unit in weight:
        chosen = torch.randperm(hidden)[:_CONNECTIONS]
        unit[chosen] = torch.randn(len(chosen))
    radius = float(torch.linalg.eigvals(weight.double()).abs().max())
    # rounded, since the last bits of eigenvalues may differ between machines, and weights must not
    return weight * (_SPECTRAL_RADIUS / float(f"{radius:.4g}"))
