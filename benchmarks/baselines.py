"""The contenders of optimizers.py: dhf, and what else minimises the same objective, each a loop on one core under one clock."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import dhf
from dhf.objective import rows, select
from dhf.problems import Problem, Shard

__all__ = ["CONTENDERS", "Contender", "Finished", "Recorder", "Task", "regularised_loss"]

_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_HISTORY = 50
# a value is recorded once this share of the time so far, and of the limit, has passed
_SPACING, _FIRST_SPACING = 0.03, 1 / 3000
# an iteration may take this many seconds before it is cut: an import that it makes must not be
_FIRST_CUT = 5.0


class Finished(BaseException):  # not an Exception: optimizers that report those as failures let it through
    """The run is over: the target is reached, the time is up, or the values are no longer finite."""


class Recorder:
    """The clock of one run, in CPU seconds of the process without what is uncounted, and the curve that it takes.

    Args:
        measure: Gives the values by name; the first is the one that is compared with the target.
        limit: CPU seconds at which the run is cut, also within an iteration.
        target: Value at which the run is over, or None.
        least: CPU seconds that the run goes on even if the target is reached.
    """

    def __init__(
        self, measure: Callable[[], Mapping[str, float]], limit: float, target: float | None = None, least: float = 0.0
    ) -> None:
        self._measure, self._limit, self._target, self._least = measure, limit, target, least
        self._excluded, self._paused, self._reached = 0.0, False, False
        self.points: dict[str, list[float]] = {"seconds": []}
        self.iterations = 0
        self._began = time.process_time()
        self._record(0.0)
        signal.signal(signal.SIGPROF, self._cut)
        signal.setitimer(signal.ITIMER_PROF, max(limit, _FIRST_CUT))

    def seconds(self) -> float:
        """CPU seconds of the run so far."""
        return time.process_time() - self._began - self._excluded

    def note(self, place: Callable[[], None] | None = None) -> None:
        """Call after each iteration: records the values if it is time to.

        Args:
            place: Puts the iterate into the module, for methods that keep it elsewhere.

        Raises:
            Finished: If the run is over.
        """
        self.iterations += 1
        seconds = self.seconds()
        last = self.points["seconds"][-1]
        if seconds - last >= max(_SPACING * last, _FIRST_SPACING * self._limit) or seconds >= self._limit:
            self._record(seconds, place)
        if seconds >= self._limit:
            raise Finished("time limit")

    def close(self, place: Callable[[], None] | None = None) -> None:
        """Record the last values of a run that has ended by itself."""
        with contextlib.suppress(Finished):
            self._record(self.seconds(), place)

    def stop_clock(self) -> None:
        """Take the alarm back; call it before anything else runs."""
        signal.setitimer(signal.ITIMER_PROF, 0)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is done inside is not counted."""
        began, self._paused = time.process_time(), True
        try:
            yield
        finally:
            self._excluded += time.process_time() - began
            self._paused = False

    def _record(self, seconds: float, place: Callable[[], None] | None = None) -> None:
        with self.uncounted():
            if place is not None:
                place()
            values = self._measure()
        if not all(map(math.isfinite, values.values())):
            raise Finished("values are not finite")
        self.points["seconds"].append(float(f"{seconds:.4g}"))
        for name, value in values.items():
            self.points.setdefault(name, []).append(float(f"{value:.5g}"))
        self._reached |= self._target is not None and next(iter(values.values())) <= self._target
        if self._reached and seconds >= self._least:
            raise Finished("target reached")

    def _cut(self, *_: object) -> None:
        left = max(self._limit, _FIRST_CUT) - self.seconds()
        if self._paused or left > 0:
            signal.setitimer(signal.ITIMER_PROF, max(left, 0.01))
        else:
            raise Finished("time limit")


@dataclasses.dataclass
class Task:
    """What a contender is given.

    Attributes:
        problem: The model, at its starting point, and its data.
        dtype: That of parameters and data.
        seed: Names the order of mini-batches.
        batch: Samples in a step of dhf; None for all of them.
        recorder: Called after each iteration.
    """

    problem: Problem
    dtype: torch.dtype
    seed: int
    batch: int | None
    recorder: Recorder

    def whole(self) -> Any:
        """All training data as one batch."""
        return self._shard(None).batches(0)[0]

    def batches(self, size: int | None) -> Iterator[Any]:
        """Batches without end: all data each time, or mini-batches in an order drawn anew for each epoch."""
        if size is None:
            data = self.whole()
            while True:
                yield data
        if not isinstance(self.problem.train, tuple):  # drawn anew for each step
            shard = self._shard(size)
            step = 0
            while True:
                with self.recorder.uncounted():
                    batch = shard.batches(step)[0]
                yield batch
                step += 1
        data = self.whole()
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for index in torch.randperm(rows(data), generator=generator).split(size):
                yield select(data, index)

    def _shard(self, size: int | None) -> Shard:
        return Shard(
            self.problem.train, 0, 1, device=torch.device("cpu"), dtype=self.dtype, batch_size=size, seed=self.seed
        )


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to minimise, with the settings among which its best is chosen.

    Attributes:
        run: ``run(task, **settings)``; returns why it ended, if it ends by itself.
        settings: One or more sets of keyword arguments.
    """

    run: Callable[..., str | None]
    settings: list[dict[str, Any]] = dataclasses.field(default_factory=lambda: [{}])


def regularised_loss(objective: dhf.Objective, batch: Any) -> Tensor:
    """The objective on a batch, weight decay included."""
    loss = objective.loss(objective.outputs(batch), batch)
    if objective.weight_decay:
        loss = loss + 0.5 * objective.weight_decay * sum(p.square().sum() for p in objective.module.parameters())
    return loss


def hessian_free(task: Task, **options: Any) -> str:
    """dhf with its defaults, or with these options."""
    optimizer = dhf.HessianFree(task.problem.objective, seed=task.seed, **options)
    for batch in task.batches(task.batch):
        report = optimizer.step([batch])
        task.recorder.note()
        if report.reason is dhf.Reason.GRADIENT_ZERO:
            break
    return "the gradient is zero"


def adam(task: Task, learning_rate: float, batch: int | None = None) -> None:
    """torch's Adam, fused, with a constant learning rate."""
    objective = task.problem.objective
    optimizer = torch.optim.Adam(objective.module.parameters(), lr=learning_rate, fused=True)
    for samples in task.batches(batch):
        optimizer.zero_grad()
        regularised_loss(objective, samples).backward()
        optimizer.step()
        task.recorder.note()


def lbfgs(task: Task) -> str:
    """torch's L-BFGS with strong-Wolfe line search, 20 iterations per call; its history is emptied where it stalls."""
    objective, data = task.problem.objective, task.whole()
    parameters = list(objective.module.parameters())

    def optimizer() -> torch.optim.LBFGS:
        return torch.optim.LBFGS(
            parameters,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )

    def closure() -> Tensor:
        current.zero_grad()
        loss = regularised_loss(objective, data)
        loss.backward()
        return loss

    current, fresh = optimizer(), True
    while True:
        before = parameters_to_vector(parameters).detach().clone()
        current.step(closure)
        task.recorder.note()
        stalled = torch.equal(before, parameters_to_vector(parameters))
        if stalled and fresh:
            return "stalled"
        fresh = stalled
        if stalled:
            current = optimizer()


class _Flat(torch.nn.Module):
    """What is computed of the objective, as a function of one flat vector."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.objective, self.data = task.problem.objective, task.whole()
        self.module = self.objective.module
        named = dict(self.named_parameters())
        self._names, self._like = list(named), list(named.values())
        self.start = parameters_to_vector(self._like).detach().clone()

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return function(*arguments)

    def loss(self, x: Tensor) -> Tensor:
        """The objective on all data at x, shape (n,)."""
        return self._at(x, regularised_loss, self.objective, self.data)

    def residuals(self, x: Tensor, batch: Any) -> Tensor:
        """The objective's outputs at x, shape (N,)."""
        return self._at(x, self.objective.outputs, batch)

    def place(self, x: Tensor) -> Callable[[], None]:
        """What puts x into the module."""
        return lambda: vector_to_parameters(x.detach().clone(), self._like)

    def _at(self, x: Tensor, *call: Any) -> Tensor:
        pieces = x.split([p.numel() for p in self._like])
        named = {n: piece.view_as(p) for n, piece, p in zip(self._names, pieces, self._like, strict=True)}
        return torch.func.functional_call(self, named, call)


def scipy_minimize(task: Task, method: str, **options: Any) -> str:
    """SciPy's method with its own tolerances off; Hessian products differentiate a gradient graph built once per point."""
    from scipy.optimize import minimize

    flat = _Flat(task)
    graph: tuple[np.ndarray, Tensor, Tensor] | None = None

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x.copy()).requires_grad_()
        f = flat.loss(point)
        (gradient,) = torch.autograd.grad(f, point)
        return float(f.detach()), gradient.numpy()

    def product(x: np.ndarray, v: np.ndarray) -> np.ndarray:
        nonlocal graph
        if graph is None or not np.array_equal(graph[0], x):
            point = torch.from_numpy(x.copy()).requires_grad_()
            graph = x.copy(), point, torch.autograd.grad(flat.loss(point), point, create_graph=True)[0]
        return torch.autograd.grad(graph[2], graph[1], torch.from_numpy(v), retain_graph=True)[0].numpy()

    def callback(x: np.ndarray) -> None:
        task.recorder.note(flat.place(torch.from_numpy(x)))

    second_order = {"hessp": product} if method in ("trust-ncg", "newton-cg") else {}
    result = minimize(
        value_and_gradient,
        flat.start.numpy(),
        method=method,
        jac=True,
        callback=callback,
        options={"maxiter": 10**9, **options},
        **second_order,
    )
    task.recorder.close(flat.place(torch.from_numpy(result.x)))
    return str(result.message)


def torchmin(task: Task, method: str, **options: Any) -> str:
    """pytorch-minimize's method with its own tolerances off."""
    from torchmin import minimize

    flat = _Flat(task)

    def callback(x: Tensor) -> None:
        task.recorder.note(flat.place(x))

    result = minimize(flat.loss, flat.start, method=method, max_iter=10**9, callback=callback, options=options)
    task.recorder.close(flat.place(result.x))
    return str(result.message)


def scipy_least_squares(task: Task, **options: Any) -> str:
    """MINPACK's Levenberg-Marquardt by SciPy, for at least as many samples as parameters; rows of J by vmap over samples."""
    from scipy.optimize import least_squares

    flat = _Flat(task)

    def one(x: Tensor, sample: Any) -> Tensor:
        return flat.residuals(x, [part.unsqueeze(0) for part in sample])[0]

    rows_of = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))

    def residuals(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return flat.residuals(torch.from_numpy(x), flat.data).numpy()

    def jacobian_at(x: np.ndarray) -> np.ndarray:  # taken once at each new point
        point = torch.from_numpy(x.copy())
        jacobian = rows_of(point, flat.data).numpy()
        task.recorder.note(flat.place(point))
        return jacobian

    tolerances = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
    result = least_squares(
        residuals, flat.start.numpy(), jacobian_at, method="lm", max_nfev=10**9, **tolerances, **options
    )
    task.recorder.close(flat.place(torch.from_numpy(result.x)))
    return str(result.message)


def sklearn_newton(task: Task) -> str:
    """scikit-learn's Newton's method with a dense Hessian, made for logistic regression and seen only when it has ended."""
    from sklearn.linear_model import LogisticRegression

    objective, (x, y) = task.problem.objective, task.whole()
    (weight,) = objective.module.parameters()
    strength = 1 / (len(x) * objective.weight_decay)
    model = LogisticRegression(C=strength, solver="newton-cholesky", fit_intercept=False, tol=1e-12, max_iter=1000)
    model.fit(x.numpy(), y.view(-1).numpy())
    task.recorder.close(lambda: vector_to_parameters(torch.from_numpy(model.coef_).view(-1), [weight]))
    return "converged"


CONTENDERS: dict[str, Contender] = {
    "dhf": Contender(hessian_free),
    "dhf-cgls": Contender(hessian_free, [{"solver": "cgls"}]),
    "dhf-cg": Contender(hessian_free, [{"solver": "cg"}]),
    "adam": Contender(adam, [{"learning_rate": r} for r in _RATES]),
    "adam-minibatch": Contender(adam, [{"learning_rate": r, "batch": b} for b in (100, 500) for r in _RATES]),
    "lbfgs": Contender(lbfgs),
    "scipy-l-bfgs": Contender(
        scipy_minimize, [{"method": "L-BFGS-B", "maxcor": _HISTORY, "ftol": 0, "gtol": 0, "maxfun": 10**9}]
    ),
    "scipy-trust-ncg": Contender(scipy_minimize, [{"method": "trust-ncg", "gtol": 0}]),
    "scipy-newton-cg": Contender(scipy_minimize, [{"method": "newton-cg", "xtol": 0}]),
    "scipy-lm": Contender(scipy_least_squares, [{"x_scale": 1.0}, {"x_scale": "jac"}]),
    "sklearn-newton": Contender(sklearn_newton),
    "torchmin-l-bfgs": Contender(torchmin, [{"method": "l-bfgs", "history_size": _HISTORY, "gtol": 0, "xtol": 0}]),
    "torchmin-trust-ncg": Contender(torchmin, [{"method": "trust-ncg", "gtol": 0}]),
    "torchmin-newton-cg": Contender(torchmin, [{"method": "newton-cg", "xtol": 0}]),
}
