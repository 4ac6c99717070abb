"""How cost falls as ranks are added: strong and weak scaling, links, sharded vectors, early all-reduce; and a cost model.

    python benchmarks/scaling.py              # measure (about ten minutes), fit, predict, write JSON, page and picture
    python benchmarks/scaling.py --refit      # the last two from the JSON that is there

Each group of setups takes turns within one start of the ranks, one thread per rank. Two hosts are network namespaces (root alone
can make them). See scaling_ranks.py for the phases.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from two_hosts import HostsUnavailable, two_hosts

ROOT = Path(__file__).parents[1]
ITERATIONS = 10
NAMES = ("product", "graphs", "preconditioner", "line search", "vectors", "waiting")
BUCKET = 250_000
LINKS = {"1 Gbit/s": (0, 1000), "1 ms": (1000, 0), "1 Gbit/s and 1 ms": (1000, 1000)}
GPUS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
MODELS = {"10 million": 1e7, "100 million": 1e8, "1 billion": 1e9}
SAMPLES = 65_536

# what the predictions assume of a GPU cluster; none of it has been measured here
ASSUMED = {
    "flop_per_s": 0.6 * 67e12,
    "memory_bytes_per_s": 0.8 * 3.35e12,
    "within_node_bytes_per_s": 0.8 * 450e9,
    "between_nodes_bytes_per_s": 0.8 * 50e9,
    "latency_s": 1e-5,
    "gpus_per_node": 8,
    "launch_s_per_product": 2e-3,
    "product_in_gradients": 1.26,
    "vector_passes": 20,
    "share_of_product_that_hides": 0.5,
}


def solve(batch: int, **options: Any) -> dict[str, Any]:
    """A setup: one solve."""
    return {"kind": "solve", "batch": batch, "iterations": ITERATIONS, **options}


def step(batch: int, **options: Any) -> dict[str, Any]:
    """A setup: one step of the optimizer."""
    return {"kind": "step", "batch": batch, "iterations": ITERATIONS, **options}


def setups(batches: Sequence[int], *, steps: bool) -> list[dict[str, Any]]:
    """What takes turns in one group."""
    found = [solve(batch) for batch in batches]
    found += [solve(batches[-1], vectors="sharded"), solve(batches[-1], bucket_bytes=BUCKET)]
    return found + ([step(batches[-1]), step(batches[-1], vectors="sharded")] if steps else [])


def run(commands: Sequence[Sequence[str]], out: Path) -> dict[str, Any]:
    """Start commands that end together, and read what they write."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(c, env=environment, cwd=ROOT) for c in commands]
    codes = [process.wait(timeout=900) for process in running]
    if any(codes):
        raise RuntimeError(f"{commands[0]} ended with {codes}")
    return json.loads(out.read_text())


def worker(wanted: list[dict[str, Any]], rounds: int, out: Path, *more: str) -> list[str]:
    """The arguments of scaling_ranks.py."""
    words = ["--setups", json.dumps(wanted), "--rounds", str(rounds), "--out", str(out), "--link", "1", *more]
    return [str(Path(__file__).with_name("scaling_ranks.py")), *words]


def torchrun(ranks: int, *words: str) -> list[str]:
    """Ranks on this machine."""
    launcher = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--local-addr=127.0.0.1"]
    return [*launcher, f"--nproc-per-node={ranks}", *words]


def measure_all(rounds: int) -> list[dict[str, Any]]:
    """Every group, as rows that name their link."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")

        def take(link: str, commands: Sequence[Sequence[str]], transport: str = "gloo") -> None:
            print(f"measuring: {link}, {transport}", flush=True)
            found = run(commands, out)
            for row in found["rows"]:
                rows.append(
                    {
                        **row,
                        "link": link,
                        "transport": found["backend"],
                        "bare": found["bare all-reduce"],
                        "n": found["n"],
                    }
                )

        for ranks in (1, 2, 4):
            batches = [1024, 4096, 2048] if ranks == 4 else [512, 1024, 2048]
            memory = [{**step(256), "kind": "memory", "vectors": v} for v in ("replicated", "sharded")]
            take("this machine", [torchrun(ranks, *worker([*setups(batches, steps=True), *memory], rounds, out))])
        mpiexec = Path(sys.executable).parent / "mpiexec"
        if mpiexec.exists():
            for backend in ("mpi", "gloo"):
                wanted = [solve(2048), solve(2048, vectors="sharded"), step(2048)]
                words = worker(wanted, rounds, out, "--backend", backend)
                take("this machine, by mpirun", [[str(mpiexec), "-n", "4", sys.executable, *words]], backend)
        for name, (delay, rate) in LINKS.items():
            wanted = [*setups([1024, 2048], steps=False), solve(2048, reduce_dtype="bfloat16")]
            try:
                with two_hosts(delay_us=delay, rate_mbit=rate) as hosts:
                    take(name, hosts.torchrun(1, *worker(wanted, rounds, out)))
            except HostsUnavailable as error:
                print(f"left out: {name}: {error}")
    return rows


def of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values; what is not named is at its default."""
    defaults = {"link": "this machine", "vectors": "replicated", "bucket_bytes": None, "reduce_dtype": None}
    asked = {**defaults, **wanted}
    for row in rows:
        if all(row.get(key, defaults.get(key)) == value for key, value in asked.items()):
            return row
    raise KeyError(wanted)


def seconds(row: dict[str, Any]) -> float:
    """The median over rounds."""
    return statistics.median(row["total"])


def phase(row: dict[str, Any], name: str) -> float:
    """The median over rounds of one phase's mean over ranks."""
    return statistics.median(one.get(name, 0.0) for one in row["phases"])


class Model:
    """Seconds of one CG iteration.

    product   a + b · samples per rank (· ranks / cores where ranks share cores)
    vectors   c · numbers held per rank, and c' · n where pieces are gathered
    network   latency · messages + bytes / bandwidth, from bare all-reduces of three sizes; half a bare all-reduce each for a
              gather and a reduce-scatter, and two small all-reduces, where vectors are in pieces

    Fitted on the solves of FITTED, by least squares of relative errors; all others are held back.
    """

    FITTED = (
        {"ranks": 1, "batch": 512},
        {"ranks": 1, "batch": 2048},
        {"ranks": 2, "batch": 1024},
        {"ranks": 2, "batch": 2048},
        {"ranks": 2, "batch": 2048, "vectors": "sharded"},
        {"ranks": 2, "batch": 2048, "link": "1 Gbit/s"},
    )

    def __init__(self, rows: list[dict[str, Any]], cores: int) -> None:
        self.cores = cores
        fitted = [of(rows, kind="solve", **wanted) for wanted in self.FITTED]
        parts = np.array([self._terms(row) for row in fitted])
        target = np.array([seconds(row) / ITERATIONS - self.network(row) for row in fitted])
        weight = np.array([ITERATIONS / seconds(row) for row in fitted])
        from scipy.optimize import nnls

        self.coefficients = nnls(parts * weight[:, None], target * weight)[0]
        self.fitted = fitted

    def _terms(self, row: dict[str, Any]) -> list[float]:
        shared = 1.0 if "Gbit" in row["link"] or "ms" in row["link"] else max(1.0, row["ranks"] / self.cores)
        sharded = row.get("vectors") == "sharded" and row["ranks"] > 1
        held = row["n"] / row["ranks"] if sharded else row["n"]
        return [shared, shared * row["batch"] / row["ranks"], shared * held, shared * row["n"] if sharded else 0.0]

    @staticmethod
    def bare(row: dict[str, Any]) -> tuple[float, float]:
        """Latency of an all-reduce, and seconds per number."""
        sizes = np.array([point["numbers"] for point in row["bare"]], float)
        times = np.array([point["seconds"] for point in row["bare"]])
        slope = max((times[-1] - times[0]) / (sizes[-1] - sizes[0]), 0.0)
        return float(times[0]), float(slope)

    def network(self, row: dict[str, Any]) -> float:
        """Seconds in which the network works for one iteration."""
        if row["ranks"] == 1:
            return 0.0
        latency, slope = self.bare(row)
        whole = latency + slope * row["n"]
        return whole + 2 * latency if row.get("vectors") == "sharded" else whole

    def __call__(self, row: dict[str, Any]) -> float:
        """The prediction for a row."""
        network = self.network(row)
        if row.get("bucket_bytes"):
            a, b, *_ = self.coefficients
            terms = self._terms(row)
            hides = ASSUMED["share_of_product_that_hides"] * (a * terms[0] + b * terms[1])
            network = max(network - hides, network / 3)  # the last part starts when the product ends
        return float(np.dot(self._terms(row), self.coefficients)) + network

    def held_back(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Measured and predicted seconds of every solve that was not fitted."""
        found = []
        for row in rows:
            if row["kind"] == "solve" and not row.get("reduce_dtype") and all(row is not f for f in self.fitted):
                measured, predicted = seconds(row) / ITERATIONS, self(row)
                found.append(
                    {
                        **describe(row),
                        "measured_ms": 1e3 * measured,
                        "predicted_ms": 1e3 * predicted,
                        "error": predicted / measured - 1,
                    }
                )
        return found


def describe(row: dict[str, Any]) -> dict[str, Any]:
    """A row's setup in short."""
    how = "sharded" if row.get("vectors") == "sharded" else "early" if row.get("bucket_bytes") else "replicated"
    return {
        "ranks": row["ranks"],
        "batch": row["batch"],
        "link": row["link"],
        "transport": row["transport"],
        "how": how,
    }


def predict(n: float, gpus: int, how: str) -> float:
    """Seconds of one CG iteration of a fully connected network on a GPU cluster."""
    g = ASSUMED
    rows = SAMPLES / gpus
    product = g["launch_s_per_product"] + g["product_in_gradients"] * 6 * n * rows / g["flop_per_s"]
    held = n / gpus if how == "sharded" else n
    vectors = g["vector_passes"] * 4 * held / g["memory_bytes_per_s"]
    nodes = math.ceil(gpus / g["gpus_per_node"])
    within = 2 * (g["gpus_per_node"] - 1) / g["gpus_per_node"] * 4 * n / g["within_node_bytes_per_s"]
    between = 2 * (nodes - 1) / nodes * 4 * n / g["gpus_per_node"] / g["between_nodes_bytes_per_s"]
    latency = g["latency_s"] * 2 * math.ceil(math.log2(gpus))
    network = within + between + latency
    if how == "sharded":
        network += 2 * latency
    if how == "early":
        network = max(network - g["share_of_product_that_hides"] * product, latency + 0.1 * (within + between))
    return product + vectors + network


def summary(rows: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """The numbers that the README and the page tell."""
    found: dict[str, Any] = {}
    for kind in ("solve", "step"):
        one = of(rows, kind=kind, ranks=1, batch=2048)
        for ranks in (2, 4):
            for vectors in ("replicated", "sharded"):
                many = of(rows, kind=kind, ranks=ranks, batch=2048, vectors=vectors)
                found[f"strong scaling of a {kind}, {ranks} ranks, {vectors}"] = seconds(one) / seconds(many)
    for ranks in (2, 4):
        weak = of(rows, kind="solve", ranks=ranks, batch=1024 * ranks)
        found[f"weak scaling, {ranks} ranks, time over that of one"] = seconds(weak) / seconds(
            of(rows, kind="solve", ranks=1, batch=1024)
        )
        found[f"sharded over replicated, time of a solve, {ranks} ranks"] = statistics.median(
            s / r
            for s, r in zip(
                of(rows, kind="solve", ranks=ranks, batch=2048, vectors="sharded")["total"],
                of(rows, kind="solve", ranks=ranks, batch=2048)["total"],
                strict=True,
            )
        )
        held = {v: of(rows, kind="memory", ranks=ranks, batch=256, vectors=v) for v in ("replicated", "sharded")}
        whole, pieces = (
            statistics.median(p["megabytes"] for p in held[v]["phases"]) for v in ("replicated", "sharded")
        )
        # whole in any case: the direction, the product, the parameters at the step's start, and their snapshot
        needed = 4 * 4e-6 * held["replicated"]["n"]
        found[f"vector memory, {ranks} ranks"] = {
            "replicated_mb": whole,
            "sharded_mb": pieces,
            "fall over excess": (whole - pieces) / (whole - needed),
            "asked": 0.8 * (1 - 1 / ranks),
        }
    links = sorted({row["link"] for row in rows if row["ranks"] == 2} - {"this machine"})
    for link in ["this machine", *links]:
        plain = of(rows, kind="solve", ranks=2, batch=2048, link=link)
        early = of(rows, kind="solve", ranks=2, batch=2048, link=link, bucket_bytes=BUCKET)
        latency, slope = Model.bare(plain)
        network = ITERATIONS * (latency + slope * plain["n"])
        hideable = min(network, 0.5 * phase(plain, "product"))
        found[f"early all-reduce, {link}"] = {
            "seconds": seconds(early),
            "seconds without": seconds(plain),
            "network": network,
            "can be hidden": hideable,
            "share recovered": (seconds(plain) - seconds(early)) / hideable,
            "waiting": phase(early, "waiting"),
            "waiting without": phase(plain, "waiting"),
        }
        if link != "this machine":
            rounded = of(rows, kind="solve", ranks=2, batch=2048, link=link, reduce_dtype="bfloat16")
            found[f"bfloat16 over full, time of a solve, {link}"] = seconds(rounded) / seconds(plain)
    by_mpirun = [row for row in rows if row["link"] == "this machine, by mpirun"]
    for kind in ("solve", "step"):
        mpi, gloo = (
            next((r for r in by_mpirun if r["kind"] == kind and r["transport"] == t), None) for t in ("mpi", "gloo")
        )
        if mpi and gloo:
            found[f"mpi over gloo, 4 ranks, time of a {kind}"] = seconds(mpi) / seconds(gloo)
    model = Model(rows, cores)
    held_back = model.held_back(rows)
    errors = [abs(one["error"]) for one in held_back]
    found["model"] = {
        "coefficients": model.coefficients.tolist(),
        "held back": held_back,
        "median error": statistics.median(errors),
        "largest error": max(errors),
    }
    found["predictions"] = {
        name: {how: {gpus: predict(n, gpus, how) for gpus in GPUS} for how in ("replicated", "sharded", "early")}
        for name, n in MODELS.items()
    }
    return found


def page(rows: list[dict[str, Any]], found: dict[str, Any], environment: dict[str, Any]) -> str:
    """results/scaling.md."""
    lines = [
        "# Scaling",
        "",
        f"The 784-400-200-100-50-25-6-...-784 autoencoder, {rows[0]['n']:,} parameters, float32, Gauss-Newton; one thread "
        f"per rank on {environment['cores']} cores ({environment['processor']}, torch {environment['torch']}); 4 ranks share "
        f"the cores. A solve is {ITERATIONS} CG iterations, a step those, graphs, a renewal of K-FAC and trial values. Medians "
        "over rounds that take turns; `vectors` is the solver's own work. Raw numbers: scaling-cpu.json.",
        "",
        "## Measured",
        "",
        f"| link | transport | ranks | batch | what | how | seconds | {' | '.join(NAMES)} |",
        "|---|---|---|---|---|---|---|" + "---|" * len(NAMES),
    ]
    for row in rows:
        if row["kind"] == "memory":
            continue
        how = row.get("reduce_dtype") or describe(row)["how"]
        cells = [
            phase(row, name) for name in ("product", "waiting", "vectors", "graphs", "preconditioner", "line search")
        ]
        setup = [
            row["link"],
            row["transport"],
            str(row["ranks"]),
            f"{row['batch']:,}",
            row["kind"],
            how,
            f"{seconds(row):.3f}",
        ]
        lines.append(f"| {' | '.join([*setup, *(f'{cell:.3f}' if cell else '' for cell in cells)])} |")
    lines += ["", "| | |", "|---|---|"]
    for name, value in found.items():
        if isinstance(value, float):
            lines.append(f"| {name} | {value:.3f} |")
        elif name.startswith(("early", "vector memory")):
            lines.append(f"| {name} | {', '.join(f'{key} {number:.3f}' for key, number in value.items())} |")
    model = found["model"]
    lines += [
        "",
        "What can be hidden is the smaller of the network's own time and half the product's, the half that J-transpose takes.",
        "",
        "## The cost model",
        "",
        *(line.strip() for line in (Model.__doc__ or "").splitlines()),
        "",
        f"On the {len(model['held back'])} solves held back: median error {100 * model['median error']:.0f}%, largest "
        f"{100 * model['largest error']:.0f}%.",
        "",
        "| ranks | batch | link | how | measured ms | predicted ms | error |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {one['ranks']} | {one['batch']:,} | {one['link']} ({one['transport']}) | {one['how']} | "
            f"{one['measured_ms']:.1f} | {one['predicted_ms']:.1f} | {100 * one['error']:+.0f}% |"
            for one in model["held back"]
        ),
        "",
        "## Predicted for GPUs",
        "",
        f"One CG iteration of a fully connected network on {SAMPLES:,} samples in all, milliseconds. No part of it has been "
        "run; the form is the model's, the numbers are assumed:",
        "",
        *(f"- {name.replace('_', ' ')}: {value:g}" for name, value in ASSUMED.items()),
        "- all-reduce in rings, first within a node, then between nodes with every GPU its own share; latency by trees",
        "- the batch divides evenly; no rank is slower than another",
        "",
        "![predictions](scaling.png)",
        "",
    ]
    for name, by_how in found["predictions"].items():
        lines += [
            f"**{name} parameters**",
            "",
            "| GPUs | " + " | ".join(str(g) for g in GPUS) + " |",
            "|---|" + "---|" * len(GPUS),
        ]
        for how, by_gpus in by_how.items():
            times = [by_gpus.get(g, by_gpus.get(str(g))) for g in GPUS]
            lines.append(f"| {how} | " + " | ".join(f"{1e3 * t:.3g}" for t in times) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(found: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Phases of the strong scaling measured, and the predictions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    shown = [
        (ranks, vectors)
        for ranks in (1, 2, 4)
        for vectors in ("replicated", "sharded")
        if ranks > 1 or vectors == "replicated"
    ]
    bottoms = np.zeros(len(shown))
    for name in NAMES:
        heights = [phase(of(rows, kind="step", ranks=r, batch=2048, vectors=v), name) for r, v in shown]
        left.bar([f"{r}\n{v}" if r > 1 else "1" for r, v in shown], heights, bottom=bottoms, label=name)
        bottoms += heights
    left.set(xlabel="ranks, one thread each, on 2 cores", ylabel="seconds of a step, batch 2,048", title="Measured")
    left.set_ylim(0, 1.25 * max(bottoms))
    left.legend(loc="upper left", ncols=3, fontsize=8)
    styles = {"replicated": "-", "sharded": "--", "early": ":"}
    for colour, (name, by_how) in zip(("C0", "C1", "C2"), found["predictions"].items(), strict=True):
        for how, by_gpus in by_how.items():
            times = [1e3 * by_gpus.get(g, by_gpus.get(str(g))) for g in GPUS]
            right.plot(GPUS, times, styles[how], color=colour, label=f"{name}, {how}")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="GPUs",
        ylabel="milliseconds of a CG iteration",
        title=f"Predicted, {SAMPLES:,} samples",
    )
    right.set_xticks(GPUS, [str(g) for g in GPUS], rotation=45)
    right.minorticks_off()
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = measure.parser((__doc__ or "").splitlines()[0])
    arguments.add_argument("--refit", action="store_true", help="use the measurements that are there")
    arguments.set_defaults(rounds=5)
    args: argparse.Namespace = arguments.parse_args()
    path = args.output or measure.RESULTS / "scaling-cpu.json"
    torch.set_num_threads(args.threads)
    if args.refit:
        document = json.loads(path.read_text())
        rows, environment = document["rows"], document["environment"]
    else:
        rows, environment = measure_all(args.rounds), measure.environment(torch.device("cpu"))
    found = summary(rows, environment["cores"])
    path.write_text(
        json.dumps({"environment": environment, "assumed": ASSUMED, "summary": found, "rows": rows}, indent=1) + "\n"
    )
    draw(found, rows, path.with_name("scaling.png"))
    path.with_name("scaling.md").write_text(page(rows, found, environment) + "\n")
    for name, value in found.items():
        if name not in ("predictions", "model"):
            print(name, value)
    print(f"model: median error {found['model']['median error']:.1%}, largest {found['model']['largest error']:.1%}")


if __name__ == "__main__":
    main()
