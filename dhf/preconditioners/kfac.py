"""KFAC: a preconditioner of one Kronecker product per layer, inverted together with its damping.

    block of W:  (A ⊗ G + μI)⁻¹ R = U_G [ (U_Gᵀ R U_A) / (λ_G λ_Aᵀ + μ) ] U_Aᵀ,   A = U_A λ_A U_Aᵀ,  G = U_G λ_G U_Gᵀ

In the eigenbases the damping is exact for every μ; factors that are damped apart (Martens & Grosse, 2015, section 6.3) cost two
matrix products instead of four, and gave a slower optimizer on the autoencoder measured.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.coordinator import Coordinator
from dhf.curvature.kronecker import Layer, add_factors, factor_shapes, layers_of
from dhf.objective import Objective
from dhf.operator import GlobalOperator
from dhf.parameters import Parameters
from dhf.replay import SteadyMap

__all__ = ["KFAC"]

Eigen = tuple[Tensor, Tensor]


class KFAC:
    """Makes preconditioners for ``A + damping·I`` from Kronecker factors of the Fisher matrix, one pair per layer.

    Linear and Conv2d layers, biases included, have their factors, from labels sampled at the samples' places among all data; so
    the factors are the same however data are split (unless all samples of a micro-batch are ignored). Parameters of other
    modules take a diagonal: half the squared gradient for sampled labels, scaled to the Fisher matrix's, half its mean over
    the tensor. Which those are is said once.

    Args:
        refresh: Calls between new factors; damping is renewed with each.
        seed: Names the labels; the same on all ranks.

    Example:
        >>> import dhf
        >>> optimizer = dhf.HessianFree(
        ...     dhf.Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss()), preconditioner=KFAC(refresh=5)
        ... )

    Source: Martens & Grosse (2015); Grosse & Martens (2016). Deviation: exact damping in the eigenbases.
    """

    def __init__(self, *, refresh: int = 2, seed: int = 0) -> None:
        if refresh < 1:
            raise ValueError(f"refresh must be at least 1, got {refresh}")
        self._refresh, self._seed, self._calls = refresh, seed, 0
        self._eigen: list[tuple[Eigen, Eigen] | None] = []  # of a rank's own layers alone where vectors are in pieces
        self._used: list[bool] = []
        # of parameters in no layer, infinite at the others; this rank's piece where vectors are in pieces
        self._diagonal = torch.zeros(0)
        self._n = 0
        self._told = False

    def __call__(self, operator: GlobalOperator, damping: float) -> Callable[[Tensor], Tensor]:
        """The preconditioner ``r -> z`` for this damping, symmetric positive definite. Collective where factors are renewed.

        Layers are divided over the ranks: each takes the eigenvalues of its own, which all then receive; where vectors are in
        pieces, each also solves with its own alone.

        Raises:
            ValueError: If damping, weight decay included, is not positive.
        """
        mu = damping + operator.objective.weight_decay
        if not mu > 0:
            raise ValueError(f"K-FAC needs positive damping, got {damping}; its factors are singular")
        layers = layers_of(operator.objective, operator.parameters)
        known = len(self._eigen) == len(layers) and self._n == operator.shape[0]
        if self._calls % self._refresh == 0 or not known:
            self._renew(operator, layers)
        elif operator.in_pieces and len(self._diagonal) == self._n:  # as it comes from a checkpoint
            self._diagonal = operator.space.piece(self._diagonal)
        self._calls += 1
        rest = 1.0 / (self._diagonal + mu)
        parts, owners = [], []
        for layer, owner, used, eigen in zip(
            layers, _owners(layers, operator.comm.size), self._used, self._eigen, strict=True
        ):
            if not used:
                continue
            scale = None if eigen is None else 1.0 / (torch.outer(eigen[1][0], eigen[0][0]) + mu)
            parts.append(functools.partial(_solve, layer, eigen, scale))
            owners.append(owner)

        def apply(r: Tensor) -> Tensor:
            return operator.spread(parts, owners, r).addcmul_(rest, r)

        return SteadyMap(apply)

    def _renew(self, operator: GlobalOperator, layers: list[Layer]) -> None:
        objective, parameters = operator.objective, operator.parameters
        add = functools.partial(add_factors, objective, parameters, layers, self._seed + self._calls)
        *factors, places, gradient = operator.sums(add, factor_shapes(layers, parameters))
        # with labels sampled independently, samples x (mean gradient)² has the Fisher matrix's diagonal as its expectation
        squares = gradient.square_().mul_(operator.count)
        blocks = parameters.split(squares)
        for block in blocks:
            block.add_(block.mean()).mul_(0.5)
        self._used = [float(p) > 0 for p in places]
        for layer, used in zip(layers, self._used, strict=True):
            for i in (layer.weight, layer.bias):
                if used and i is not None:
                    blocks[i].fill_(math.inf)
        # a copy, that the buffer of all sums may go
        self._diagonal, self._n = operator.space.piece(squares).clone(), parameters.numel
        owners, rank = _owners(layers, operator.comm.size), operator.comm.rank
        self._eigen = [None] * len(layers)

        def take_own() -> None:
            for i, owner in enumerate(owners):
                if self._used[i] and owner == rank:
                    self._eigen[i] = _eigen(factors[2 * i] / float(places[i])), _eigen(factors[2 * i + 1])

        if operator.in_pieces:
            operator.coordinator.attempt(take_own)
        elif operator.comm.size > 1:
            self._share(operator.coordinator, layers, take_own)
        else:
            take_own()
        self._tell(operator, [layer for layer, used in zip(layers, self._used, strict=True) if used])

    def _share(
        self, coordinator: Coordinator, layers: list[Layer], take_own: Callable[[], None] = lambda: None
    ) -> None:
        """Give every rank the eigenvalues and eigenvectors of all layers from their owners, once each has taken its own."""
        sizes = [[size for s in layer.sizes for size in (s, s * s)] for layer in layers]
        owners, like = _owners(layers, coordinator.comm.size), self._diagonal

        def mine() -> Tensor:
            take_own()
            parts = []
            for eigen, wanted, owner in zip(self._eigen, sizes, owners, strict=True):
                if eigen is None or owner != coordinator.comm.rank:
                    parts.append(like.new_zeros(sum(wanted)))
                else:
                    parts += [t.reshape(-1) for pair in eigen for t in pair]
            return torch.cat(parts)

        total = coordinator.total(mine, (sum(map(sum, sizes)),), like)
        for i, (layer, flat) in enumerate(zip(layers, total.split([sum(s) for s in sizes]), strict=True)):
            if self._used[i]:
                a, g = layer.sizes
                values_a, vectors_a, values_g, vectors_g = flat.split(sizes[i])
                self._eigen[i] = ((values_a, vectors_a.view(a, a)), (values_g, vectors_g.view(g, g)))

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all that is kept, and not its own layers alone."""
        whole = all(eigen is not None for eigen, used in zip(self._eigen, self._used, strict=True) if used)
        return whole and len(self._diagonal) == self._n

    def consolidate(self, coordinator: Coordinator, objective: Objective) -> None:
        """Have every rank hold all that is kept, for :meth:`state_dict`. Collective."""
        if self._eigen:
            self._share(coordinator, layers_of(objective, Parameters(objective.module)))
        if len(self._diagonal) < self._n:
            whole = self._diagonal.new_zeros(len(self._diagonal) * coordinator.comm.size)
            coordinator.all_gather(self._diagonal, whole)
            self._diagonal = whole[: self._n].clone()

    def _tell(self, operator: GlobalOperator, layers: list[Layer]) -> None:
        covered = {i for layer in layers for i in (layer.weight, layer.bias)}
        names = operator.parameters.names
        left = [name for i, name in enumerate(names) if i not in covered]
        if left and not self._told and operator.comm.rank == 0:
            shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            warnings.warn(
                f"K-FAC covers Linear and Conv2d layers, here {len(names) - len(left)} of {len(names)} parameter tensors; "
                f"the others take a diagonal: {shown}",
                stacklevel=2,
            )
        self._told = True

    def state_dict(self) -> dict[str, Any]:
        """Factors and counters, as tensors and plain values."""
        eigen = [None if e is None else [*e[0], *e[1]] for e in self._eigen]
        return {"calls": self._calls, "eigen": eigen, "used": list(self._used), "diagonal": self._diagonal}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self._calls, self._diagonal = int(state["calls"]), state["diagonal"].clone()
        self._n = len(self._diagonal)
        self._eigen = [None if e is None else ((e[0], e[1]), (e[2], e[3])) for e in state["eigen"]]
        self._used = list(state["used"])


def _owners(layers: list[Layer], ranks: int) -> list[int]:
    """The rank that takes each layer's eigenvalues: the largest layers first, each to the rank with the least to do."""
    work, owners = [0.0] * ranks, [0] * len(layers)
    costs = [sum(size**3 for size in layer.sizes) for layer in layers]
    for i in sorted(range(len(layers)), key=lambda i: (-costs[i], i)):
        owners[i] = work.index(min(work))
        work[owners[i]] += costs[i]
    return owners


def _solve(
    layer: Layer, eigen: tuple[Eigen, Eigen] | None, scale: Tensor | None, r: Sequence[Tensor], z: Sequence[Tensor]
) -> None:
    assert eigen is not None  # its owner has it
    assert scale is not None
    (_, U_A), (_, U_G) = eigen
    R = r[layer.weight].flatten(1)
    if layer.bias is not None:
        R = torch.cat([R, r[layer.bias].unsqueeze(1)], 1)
    Z = U_G @ ((U_G.T @ R @ U_A) * scale) @ U_A.T
    z[layer.weight].copy_((Z if layer.bias is None else Z[:, :-1]).view_as(z[layer.weight]))
    if layer.bias is not None:
        z[layer.bias].copy_(Z[:, -1])


def _eigen(factor: Tensor) -> Eigen:
    """Eigenvalues, none below zero, and eigenvectors of a symmetric matrix."""
    try:
        values, vectors = torch.linalg.eigh(factor)
    except torch.linalg.LinAlgError:  # float32 may fail to converge on a matrix that float64 has no trouble with
        values, vectors = torch.linalg.eigh(factor.double())
    # row by row, as they are after ranks have exchanged them: another layout would round otherwise
    return values.clamp(min=0).to(factor.dtype), vectors.to(factor.dtype).contiguous()
