"""What dhf adds to PyTorch: its products against bare autograd on a kept graph, and CG's own share of a solve.

    python benchmarks/overhead.py [--device cuda]

g is one gradient (forward and backward) of the same network and batch in the same interleaved run.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from measure import interleave, parser, ratio, save
from networks import Case, autoencoder

import dhf

SUBJECTS = {
    "digits autoencoder, 1,797 images": ((64, 100, 50, 25, 6, 25, 50, 100, 64), 1797),
    "784-400-...-6-...-784, batch 512": ((784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784), 512),
}


class _Timed:
    """An operator that notes the seconds spent in its products."""

    def __init__(self, operator: Any) -> None:
        self._operator, self.space, self.seconds = operator, operator.space, 0.0
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def apply(self, v: torch.Tensor, *agreement: Any) -> Any:
        began = time.perf_counter()
        answer = self._operator.apply(v, *agreement)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - began
        return answer


def products(case: Case, rounds: int, device: torch.device) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Ratios of product times, and the seconds they come from."""
    module, inputs, targets = case.module.to(device), case.inputs.to(device), case.targets.to(device)
    objective = dhf.Objective(module, case.loss)
    batch = (inputs, targets)
    tensors = tuple(module.parameters())
    n = sum(p.numel() for p in tensors)
    v = torch.randn(n, device=device)
    pieces = [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in tensors]), tensors, strict=True)]
    twin = copy.deepcopy(module)  # a graph of the same parameters would keep a GPU from recording
    its_own = tuple(twin.parameters())
    kept = torch.autograd.grad(case.loss(twin(inputs), targets), its_own, create_graph=True)
    with dhf.Hessian(objective, [batch]) as H, dhf.GaussNewton(objective, [batch]) as G:
        bare = torch.cat([t.reshape(-1) for t in torch.autograd.grad(kept, its_own, pieces, retain_graph=True)])
        torch.testing.assert_close(H @ v, bare, rtol=1e-4, atol=1e-6 * float(bare.abs().max()))
        seconds = interleave(
            {
                "gradient": lambda: torch.autograd.grad(case.loss(module(inputs), targets), tensors),
                "bare Hessian product": lambda: torch.autograd.grad(kept, its_own, pieces, retain_graph=True),
                "dhf Hessian product": lambda: H.apply(v),
                "dhf Gauss-Newton product": lambda: G.apply(v),
            },
            rounds=rounds,
            device=device,
        )
    return {
        "dhf Hessian / bare": ratio(seconds, "dhf Hessian product", "bare Hessian product"),
        "dhf Hessian / g": ratio(seconds, "dhf Hessian product", "gradient"),
        "dhf Gauss-Newton / g": ratio(seconds, "dhf Gauss-Newton product", "gradient"),
    }, seconds


def vector_share(case: Case, rounds: int, device: torch.device) -> tuple[float, list[float]]:
    """The median share of a solve's time that CG spends outside products, over ``rounds`` solves of 30 iterations."""
    objective = dhf.Objective(case.module.to(device), case.loss)
    shares = []
    with dhf.GaussNewton(objective, [(case.inputs.to(device), case.targets.to(device))]) as G:
        for turn in range(rounds + 1):
            timed = _Timed(G.shifted(1e-5))
            began = time.perf_counter()
            solution = dhf.cg(timed, -G.gradient, rtol=0.0, max_iterations=30, snapshot_ratio=1.3)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                shares.append(1 - timed.seconds / (time.perf_counter() - began))
        # a solve that has converged long before its last iteration works on denormal numbers, which no real one does
        assert solution.residual_norm > 1e-8 * solution.history[0].residual_norm
    return statistics.median(shares), shares


def main() -> None:
    """Print the table and write the raw numbers."""
    arguments = parser(__doc__ or "").parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    raw = {}
    for name, (widths, batch) in SUBJECTS.items():
        case = autoencoder(widths, batch)
        ratios, seconds = products(case, arguments.rounds, device)
        share, shares = vector_share(case, max(3, arguments.rounds // 3), device)
        raw[name] = {"ratios": ratios, "cg_vector_share": share, "seconds": seconds, "cg_vector_shares": shares}
        print(f"{name} ({device.type}, {arguments.threads} thread(s), float32)")
        for key, value in ratios.items():
            print(f"  {key:<28} {value:.3f}")
        print(f"  {'CG vector work / solve':<28} {share:.3f}", flush=True)
    print(f"written {save('overhead', arguments, {'subjects': raw})}")


if __name__ == "__main__":
    main()
