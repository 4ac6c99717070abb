"""GlobalOperator: local curvature + communicator + coordinator = one symmetric operator on flat vectors.

    A v = Σ_ranks Σ_micro-batches (count / N) A_j v + weight_decay v

How the sum over ranks is taken, and what each rank holds of a vector, is the reduction's business.
"""

from __future__ import annotations

import functools
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from dhf.batches import micro_batches
from dhf.comm import Communicator, Serial
from dhf.coordinator import Coordinator, Verdict, capture, fingerprint, mark_of
from dhf.curvature import NonFinite, Retention, ShardCurvature, find_non_finite, places_in_words
from dhf.curvature.shard import AddSums, BuildGraph
from dhf.errors import NonFiniteError, RankError, StaleGraphError, UsageError
from dhf.estimators import DiagonalEstimate, TraceEstimate, diagonal, trace
from dhf.evaluation import check_module, micro_batch_seeds
from dhf.memory import ran_out_of_memory
from dhf.objective import Objective, require_objective
from dhf.operator.as_scipy import to_scipy
from dhf.operator.pieces import Pieces
from dhf.operator.reduction import Part, Reduced, Reducer, Reduction, Status, Target, Work
from dhf.operator.shifted import Compressed, Shifted
from dhf.operator.steady import Replays, Steady
from dhf.operator.whole import Whole
from dhf.parameters import Parameters
from dhf.reason import Reason

__all__ = ["GlobalOperator"]

T = TypeVar("T")


class GlobalOperator:
    """The curvature of the global objective, as a symmetric operator on flat vectors.

    A context manager: the graphs are built when it is made and freed when it is left. Every rank makes it, multiplies
    and leaves it together.

    Args:
        objective: What is differentiated.
        batches: This rank's micro-batches, each what ``objective.outputs`` takes. May be empty.
        comm: How ranks talk; one process by default.
        build: Makes the graph of one micro-batch.
        seed: Fixes dropout and other randomness for the operator's life; the same on all ranks.
        coordinator: How ranks agree; made from ``comm`` by default.
        move_buffers: Whether BatchNorm's running statistics follow this forward pass.
        debug_nonfinite: Whether to search for the sample where a loss, gradient or product is not finite.
        vectors: ``"replicated"``: every rank holds each vector whole; or ``"sharded"``: one of P equal pieces, shape (k,), the
            last filled up with zeros. ``space.piece(whole)`` and ``space.whole(piece)`` lead from one to the other.
        bucket_bytes: With replicated vectors, the all-reduce of a product is cut at parameters into parts of at least this size,
            each of which starts while the product is still being computed; None for one all-reduce at the end.
        retain: Which micro-batches keep their graphs, on each rank: ``"all"``, ``"none"``, as many as fit into so many bytes (a
            number, or a text such as ``"2GiB"``), or ``"auto"``: into the memory that is available. The others' are rebuilt for
            each product. Where memory runs out in a product, all ranks free half of theirs, and go on.
        parameters: Names of those the matrix is taken in, as patterns: ``"layers.2.*"``, a submodule's name, or several. Vectors
            are then as long as these, and the others constants. All trainable parameters by default.

    Attributes:
        loss: The global objective, weight decay included. Float.
        gradient: The global gradient, the parameters' dtype and device; shape (n,), or (k,) where vectors are sharded.
        count: Samples (or their total weight) over all ranks.
        rows: Samples of each rank.
        outputs_per_row: Numbers that the objective's outputs hold per sample.
        coordinator: How ranks agree.
        products: Products taken so far.
        micro_batches, retained: Micro-batches of all ranks, and those of them whose graphs are kept.
        space: The inner products of these vectors, and what a rank holds of them.
        RIDERS: Numbers that ride with each product besides the status word.
        STATUS: Numbers in the status word.

    Raises:
        UsageError: If the module, the loss or a batch cannot be used; on every rank, naming the rank that found it.
        NonFiniteError: If the loss or gradient is not finite.
        RankError: If code failed on a rank.
        RanksDifferError: If the ranks' parameters differ in name, shape or dtype.
        ReplicasDivergedError: If they differ in value.
    """

    RIDERS = 0
    STATUS = Coordinator.WIDTH

    def __init__(
        self,
        objective: Objective,
        batches: Iterable[Any],
        *,
        build: BuildGraph,
        comm: Communicator | None = None,
        seed: int = 0,
        coordinator: Coordinator | None = None,
        move_buffers: bool = False,
        debug_nonfinite: bool = False,
        vectors: str = "replicated",
        bucket_bytes: int | None = None,
        retain: str | int | Retention = "auto",
        parameters: str | Sequence[str] | None = None,
    ) -> None:
        require_objective(objective)
        if vectors not in ("replicated", "sharded"):
            raise UsageError(f"vectors {vectors!r} is unknown; choose from replicated, sharded")
        comm = comm if comm is not None else coordinator.comm if coordinator else _serial_for(objective)
        self.coordinator = coordinator or Coordinator(comm)
        self.comm = comm
        self.products = 0
        check_module(objective.module)
        self.objective, self.seed = objective, seed
        self.parameters = Parameters(objective.module, parameters)
        self._decay = objective.weight_decay
        self._facts = {
            **self.parameters.facts(),
            "curvature": getattr(getattr(build, "func", build), "__name__", type(build).__name__),
            "weight decay": repr(self._decay),
            "seed": str(seed),
            "vectors": f"{vectors}, buckets of {bucket_bytes} bytes",
        }

        here = self.coordinator.ranks_here()
        on_gpu = self.device.type == "cuda"
        retention = retain if isinstance(retain, Retention) else Retention(retain, sharers=1 if on_gpu else here)

        self._search: Callable[[Tensor | None], NonFinite | None] | None = None

        def build_shard() -> ShardCurvature:
            pieces = micro_batches(batches)
            if type(objective).outputs is Objective.outputs and any(isinstance(p, Tensor) for p in pieces):
                raise UsageError(
                    "batches must hold micro-batches (inputs, targets), and holds tensors; for one micro-batch give [batch]"
                )
            seeds = micro_batch_seeds(seed, comm.rank, len(pieces))
            if debug_nonfinite:
                self._search = functools.partial(find_non_finite, objective, self.parameters, pieces, seeds, build)
            return ShardCurvature(
                objective, self.parameters, pieces, seeds, build, move_buffers=move_buffers, retention=retention
            )

        self._replays = Replays(self.device)
        with self.coordinator.phases("graphs"):
            shard, failure = capture(build_shard)
        self._shard = shard
        self._reduction: Reduction = (
            Pieces(self.coordinator, self.parameters, self.RIDERS)
            if vectors == "sharded" and comm.size > 1
            else Whole(self.coordinator, self.parameters, self.RIDERS, bucket_bytes)
        )
        self.space = self._reduction.space
        self._sum_over_ranks(shard, failure)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.parameters.numel, self.parameters.numel

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.parameters.dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.parameters.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v)

    def matvec(self, v: Tensor) -> Tensor:
        """``A v``, a new tensor of v's shape, from a vector that is the same on every rank, or this rank's piece of one.

        Raises:
            ValueError: If v has another shape, dtype or device.
            StaleGraphError: If parameters moved since the graphs were built, or the operator was closed.
            NonFiniteError: If the product is not finite; it names the ranks.
            RankError: If code failed on a rank.
        """
        product, verdict = self.apply(v)
        if verdict.reason is Reason.NON_FINITE:
            nothing = v * 0.0  # whose square, unlike that of v, cannot overflow
            if not all(math.isfinite(x) for x in self.space.dots((nothing, nothing))):
                raise ValueError("the vector of the product holds NaN or infinity itself")
            raise NonFiniteError(
                f"the product holds NaN or infinity, from {places_in_words(self.non_finite)}; look at its data",
                self.non_finite,
            )
        return product.clone()

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None, shift: float = 0.0
    ) -> tuple[Tensor, Verdict]:
        """``(A + shift·I) v`` and what all ranks agreed; the tensor is overwritten by the next product.

        Args:
            v: Shape (n,), or (k,) where vectors are sharded.
            proposal: Why this rank's solver wants to end, or None to go on.
            failure: What went wrong on this rank since the last product; it is raised on every rank.
            shift: Added to the diagonal.
        """
        reduced = self._reduce(self._multiply, v, proposal, failure, [(v, self._decay), (v, shift)])
        return reduced.product, reduced.verdict

    def agree(self, proposal: Reason | None, failure: Exception | None = None) -> Verdict:
        """What all ranks agreed, with no product of this rank's; in the collectives of a product, for others may take one."""
        return self._reduce(lambda _, target: target.out.zero_(), None, proposal, failure).verdict

    @property
    def queues(self) -> bool:
        """Whether :meth:`start`, :meth:`send` and :meth:`read` may be used: on a GPU, with whole vectors sent in one piece."""
        return self.device.type == "cuda" and isinstance(self._reduction, Whole) and self._reduction.at_once

    def start(self, v: Tensor) -> None:
        """Launch this rank's share of ``A v``, shape (n,), on a GPU, and do not wait for it. Not collective."""
        assert isinstance(self._reduction, Whole)
        self.products += 1
        self._started = self._reduction.start(self._multiply, v, Status(moved=self._moved))

    def send(self) -> tuple[Tensor, Tensor, float]:
        """Sum what was started last over the ranks. Collective, and the first half of it.

        Returns:
            ``A v - diagonal·v``, shape (n,), the status word, shape (STATUS,), both still being written; and the diagonal.
        """
        assert isinstance(self._reduction, Whole)
        return *self._reduction.send(Status(), self._started), self._decay

    def read(self, status: Sequence[float], v: Tensor) -> Verdict:
        """What all ranks agreed about a product of v, from the numbers in its status word. The second half of the collective."""
        try:
            return self.coordinator.read(status, search=self._searching(v))
        except Exception as error:
            if not self._make_room(error):
                raise
            return Verdict(None, valid=False)

    def spread(self, parts: Sequence[Part], owners: Sequence[int], r: Tensor) -> Tensor:
        """See :meth:`Reduction.spread`."""
        return self._reduction.spread(parts, owners, r)

    @property
    def in_pieces(self) -> bool:
        """Whether a rank holds one piece of each vector."""
        return isinstance(self._reduction, Pieces)

    def sums(self, add: AddSums, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Sums over all samples of what ranks compute each for themselves, in one collective.

        Args:
            add: ``add(micro_batch, out)`` adds a micro-batch's part to the tensors ``out``. Called with the random numbers of
                that micro-batch, and kernels that can be differentiated twice.
            shapes: The tensors' shapes; a rank whose shard is empty must know them too.

        Returns:
            One tensor per shape, the parameters' dtype and device; the same on every rank.

        Raises:
            StaleGraphError, NonFiniteError, RankError: As :meth:`matvec`.
        """
        return self._with_room(lambda: self._sums(add, shapes))

    def _sums(self, add: AddSums, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in shapes]
        buffer = torch.zeros(sum(sizes) + Coordinator.WIDTH, dtype=self.dtype, device=self.device)
        flat, word = buffer[: sum(sizes)], buffer[sum(sizes) :]
        pieces = [piece.view(*shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
        _, failure = capture(lambda: self._open_shard().add_sums(add, pieces))
        if failure is not None:
            flat.zero_()
        self.coordinator.fill(word, failure=failure, finite=flat.sum())
        self.coordinator.all_reduce(buffer)
        if self.coordinator.read(word).reason is Reason.NON_FINITE:
            raise NonFiniteError(
                f"a sum over samples holds NaN or infinity, from {places_in_words(self.non_finite)}; look at its data",
                self.non_finite,
            )
        return pieces

    @property
    def non_finite(self) -> dict[int, NonFinite | None]:
        """The ranks that put NaN or infinity into the last product that held any; with the sample where one was looked for."""
        return self.coordinator.non_finite

    def shifted(self, damping: float) -> Shifted:
        """``A + damping·I``, on the same graphs."""
        return Shifted(self, damping)

    def compressed(self, damping: float = 0.0) -> Compressed:
        """``A + damping·I``, on the same graphs, with products that ranks send to one another in bfloat16."""
        return Compressed(self, damping)

    def trace(self, *, products: int = 60, deflate: bool = True, seed: int = 0) -> TraceEstimate:
        """The trace with its standard error; see :func:`dhf.trace`."""
        return trace(self, products=products, deflate=deflate, seed=seed)

    def diagonal(self, *, products: int = 120, deflate: bool = True, seed: int = 0) -> DiagonalEstimate:
        """The diagonal with its standard errors; see :func:`dhf.diagonal`."""
        return diagonal(self, products=products, deflate=deflate, seed=seed)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` of the same products; see :func:`dhf.operator.to_scipy`."""
        return to_scipy(self)

    def close(self) -> None:
        """Free the graphs; ``loss`` and ``gradient`` stay."""
        self._replays.forget()
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def __enter__(self) -> GlobalOperator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _searching(self, v: Tensor | None) -> Callable[[], NonFinite | None] | None:
        return None if self._search is None else functools.partial(self._search, v)

    def _reduce(
        self,
        work: Work,
        v: Tensor | None,
        proposal: Reason | None,
        failure: BaseException | None,
        add: Sequence[tuple[Tensor, float]] = (),
        by: Reducer | None = None,
    ) -> Reduced:
        status = Status(proposal, failure, self._moved, self._searching(v))
        self.products += v is not None
        added, reducer = [(vector, factor) for vector, factor in add if factor], by or self._reduction
        return self._with_room(lambda: reducer.reduce(work, v, status, added))

    def _with_room(self, work: Callable[[], T]) -> T:
        """What a collective work returns; where only memory is wanting, on any rank, all ranks make room and repeat it."""
        while True:
            try:
                return work()
            except Exception as error:
                if not self._make_room(error):
                    raise

    def _make_room(self, error: Exception) -> bool:
        """Free half of every rank's graphs, if an error that all ranks have says that memory has run out on one of them."""
        if self.comm.size > 1:
            ran_out = isinstance(error, RankError) and error.out_of_memory
        else:
            ran_out = ran_out_of_memory(error) and hasattr(error, "micro_batch")
        shard = self._shard
        if not ran_out or shard is None:
            return False
        for raised in (error, error.__cause__):
            if raised is not None:
                traceback.clear_frames(raised.__traceback__)  # they hold what had been computed
        self._replays.forget()
        freed = shard.free_half()
        everyone = self.comm.gather_objects((freed, shard.retained, shard.micro_batches))
        if not any(freed for freed, _, _ in everyone):
            return False
        self.retained = sum(retained for _, retained, _ in everyone)
        if self.comm.rank == 0:
            who = f"rank {error.rank} ({error.host})" if isinstance(error, RankError) else "the process"
            warnings.warn(
                f"{who} ran out of memory in a product: the graphs of {self.retained} of {self.micro_batches} micro-batches "
                "are kept from now on, the others rebuilt for each product",
                stacklevel=2,
            )
        return True

    def _moved(self) -> Tensor | None:
        return self._shard.moved() if self._shard is not None else None

    def _open_shard(self) -> ShardCurvature:
        if self._shard is None:
            raise StaleGraphError("the operator is closed: its graphs have been freed")
        return self._shard

    @property
    def _multiply(self) -> Steady:
        # made each time: kept, it would be a cycle
        return Steady(self._launch, self._prepare, self._replays, self.coordinator.phases)

    def _prepare(self, v: Tensor) -> bool:
        """Refuse what cannot be multiplied; whether all graphs are kept."""
        self.parameters.check_vector(v)
        shard = self._open_shard()
        if self.device.type == "cuda":  # where a replay may take the place of the shard's own look
            shard.check()
        return shard.retained == shard.micro_batches

    def _launch(self, v: Tensor | None, target: Target) -> None:
        assert v is not None
        self._open_shard().product(v, target.out, ready=target.ready)

    def _sum_over_ranks(self, shard: ShardCurvature | None, failure: BaseException | None) -> None:
        """Add up losses, counts and gradients, tell every shard its place, and compare replicas, in two collectives."""
        comm, coordinate = self.comm, self.coordinator
        theta = self.parameters.read()
        everything = self.parameters.read_all() if self.parameters.others else theta
        places = [0.0] * comm.size
        if shard is not None:
            places[comm.rank] = shard.rows
        sums = [shard.loss_sum, shard.count] if shard is not None else [0.0, 0.0]
        sums += [shard.width, shard.width > 0] if shard is not None else [0.0, 0.0]
        sums += [shard.micro_batches, shard.retained, shard.ran_out] if shard is not None else [0.0, 0.0, 0.0]
        # the decay term is rank 0's alone, so that every rank holds the same bits of the loss
        decay = 0.5 * self._decay * float(everything.double().square().sum()) if comm.rank == 0 else 0.0
        mark = coordinate.mark(mark_of(self._facts) ^ fingerprint(everything))
        loss_sum, total, widths, known, micro_batches, retained, ran_out, decay, *rest = coordinate.reduce(
            [*sums, decay, *places, *mark], failure=failure
        )
        assert shard is not None
        self.micro_batches, self.retained = int(micro_batches), int(retained)
        if ran_out:
            self._warn_of_few_graphs(shard)
        if not coordinate.same(rest[comm.size :]):
            coordinate.raise_difference(self._facts)
            coordinate.require_replicas(everything)
        rows = [int(r) for r in rest[: comm.size]]
        self.count, self.rows = total, rows
        self.outputs_per_row = round(widths / known) if known else 0
        with coordinate.phases("graphs"):
            _, failure = capture(lambda: self._place(shard, total, sum(rows[: comm.rank])))

        def write_gradient(_: Tensor | None, target: Target) -> None:
            # not finite where the loss is not
            scale = 1.0 / total if total else 0.0
            torch.mul(shard.gradient_sum, scale if math.isfinite(shard.loss_sum) else math.nan, out=target.out)

        piece = self.space.piece(theta)
        reduced = self._reduce(write_gradient, None, None, failure, [(piece, self._decay)])
        shard.gradient_sum = torch.empty(0)
        verdict = reduced.verdict
        self.loss = loss_sum / total + decay
        self.gradient = reduced.product.clone()
        if verdict.reason is Reason.NON_FINITE:
            raise NonFiniteError(
                f"the loss is {self.loss:g} and its gradient not finite, from {places_in_words(self.non_finite)}; "
                "look for NaN in the data, a loss that overflows, or too large initial weights",
                self.non_finite,
            )

    def _warn_of_few_graphs(self, shard: ShardCurvature) -> None:
        """Say on rank 0 which ranks ran out of memory while they built their graphs. Collective."""
        everyone = self.comm.gather_objects(shard.ran_out)
        if self.comm.rank == 0:
            ranks = ", ".join(str(rank) for rank, ran_out in enumerate(everyone) if ran_out)
            warnings.warn(
                f"rank {ranks} ran out of memory while graphs were built: those of {self.retained} of {self.micro_batches} "
                "micro-batches are kept, the others rebuilt for each product",
                stacklevel=2,
            )

    @staticmethod
    def _place(shard: ShardCurvature, total: float, first_row: int) -> None:
        if total == 0:
            raise UsageError("no rank has a sample; give at least one rank a micro-batch")
        shard.begin(total, first_row)


def _serial_for(objective: Objective) -> Serial:
    return Serial(Parameters(objective.module).device)
