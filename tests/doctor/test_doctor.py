"""The doctor on tiny problems with exactly one fault each: it is found, named, and told how to be mended."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dhf.__main__ import main
from dhf.commands.doctor import EXIT_CHANGE
from dhf.train import main as train

FAULTS = Path(__file__).with_name("faults.py")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process, whatever the tests were started by; and torch's settings as before."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def look(capsys, fault: str | None, *flags: str) -> tuple[int, list[dict], dict]:
    """The exit code, the findings, and the whole answer, of a problem with this fault."""
    problem = [] if fault is None else ["--problem", f"{FAULTS}:build", "--options.fault", fault]
    code = main(["doctor", *problem, "--json", "--threads", "1", *flags])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ready"], answer["exit_code"]) == (code == 0, code)
    return code, [finding for section in answer["sections"] for finding in section["findings"]], answer


@pytest.mark.parametrize(
    ("fault", "severity", "where", "what", "remedy"),
    [
        ("flash", "error", "module '1'", "fused attention has no second derivative", "MATH"),
        ("cudnn", "error", "module '1'", "cuDNN has no second derivative", "torch.nn.RNN, GRU or LSTM"),
        ("once", "error", "module '1'", "marked once_differentiable", "differentiable operations"),
        ("compiled", "error", "module '1'", "is compiled or wrapped", "pass the plain module"),
        ("compiled function", "error", "module '1'", "torch.compile makes code without a second derivative", "plain"),
        ("dropout", "warning", "module '1'", "dropout is on", "eval()"),
        ("functional dropout", "warning", "module '1' (Apply)", "depends on random numbers", "eval()"),
        ("batchnorm", "warning", "module '1'", "BatchNorm in training mode", "use eval() for it, or GroupNorm"),
        ("sum", "error", "loss(outputs, batch)", "is a sum over samples, not their mean", ".mean()"),
        ("sum by torch", "error", "the problem", "MSELoss has reduction='sum'", "use reduction='mean'"),
        (
            "pairs",
            "error",
            "loss(outputs, batch)",
            "is no mean over samples",
            "samples that do not depend on one another",
        ),
        (
            "unused",
            "warning",
            "parameter '1.spare.weight', '1.spare.bias'",
            "does not depend on it",
            "requires_grad_(False)",
        ),
        (
            "drift",
            "error",
            "module '1' (Drift)",
            "in two evaluations with the same random numbers",
            "no counter, clock",
        ),
        ("python random", "error", "module '1' (Apply)", "in two evaluations", "Python or NumPy random numbers"),
        ("wrong", "error", "outputs(batch)", "the gradient differs from finite differences", "whose backward is wrong"),
        ("detach", "error", "outputs(batch)", "the gradient differs from finite differences", "detach()"),
        ("infinite", "error", "loss(outputs, batch)", "the loss is inf at the start", "NaN in the data"),
    ],
)
def test_a_fault_is_found_named_and_told_how_to_be_mended(capsys, fault, severity, where, what, remedy):
    code, findings, _ = look(capsys, fault)
    assert code == EXIT_CHANGE
    mattering = [f for f in findings if f["severity"] != "note"]
    found = [f for f in mattering if what in f["what"]]
    assert len(found) == 1, mattering
    assert found[0]["severity"] == severity
    assert where in found[0]["where"]
    assert remedy in found[0]["remedy"]
    # exactly this fault: whatever else is said follows from it
    allowed = {"wrong": 2, "detach": 2}.get(fault, 1)
    assert len(mattering) <= allowed, mattering


@pytest.mark.parametrize("fault", ["", "attention", "gru"])
def test_what_has_no_fault_is_ready(capsys, fault):
    code, findings, answer = look(capsys, fault)
    assert (code, [f for f in findings if f["severity"] != "note"]) == (0, [])
    assert set(answer["recommended"]) == {"micro-batch-size", "preset", "retain", "products", "dtype"}
    assert main(["doctor", "--problem", f"{FAULTS}:build", "--options.fault", fault, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "ready"
    assert re.search(r"^  second derivative +\d of \d modules$", out, re.MULTILINE)
    assert "\x1b" not in out


def test_batches_of_a_loader_are_looked_at_as_it_makes_them(capsys):
    code, findings, answer = look(capsys, None, "--problem", f"{FAULTS}:dictionaries")
    assert (code, [f for f in findings if f["severity"] != "note"]) == (0, [])
    facts = {f["label"]: f["text"] for section in answer["sections"] for f in section["facts"]}
    assert facts["mean over samples"].startswith("yes")
    assert facts["samples"] == "11 a step of 11; 11 per rank"


@pytest.mark.parametrize("fault", ["gru", "lstm"])
def test_recurrent_layers_are_told_of_cudnn_and_remain_usable(capsys, fault):
    code, findings, _ = look(capsys, fault)
    assert code == 0
    (note,) = [f for f in findings if "cuDNN has no second derivative" in f["what"]]
    assert (note["severity"], note["where"]) == ("note", "module '1.rnn'")
    assert not [f for f in findings if "no forward derivative" in f["what"]]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_numbers_agree_with_finite_differences(capsys, curvature):
    _, _, answer = look(capsys, "", "--curvature", curvature)
    facts = {f["label"]: f["text"] for section in answer["sections"] for f in section["facts"]}
    product = "Hessian product" if curvature == "hessian" else "Gauss-Newton product"
    for label in ("gradient", product):
        assert float(facts[label].split()[2]) < 1e-6


@pytest.mark.parametrize("careful", ["true", "false"])
def test_residuals_that_take_derivatives_are_ready(capsys, careful):
    code, findings, _ = look(capsys, None, "--problem", f"{FAULTS}:slope", "--options.careful", careful)
    assert (code, [f for f in findings if f["severity"] != "note"]) == (0, [])


def test_float32_with_a_tolerance_that_it_cannot_reach(capsys):
    flags = ("--cg-rtol", "1e-9", "--damping", "1e-4", "--solver", "cg")
    code, findings, _ = look(capsys, "ill-conditioned", *flags)
    assert code == EXIT_CHANGE
    (found,) = [f for f in findings if f["severity"] != "note"]
    assert (found["severity"], found["where"]) == ("warning", "--cg-rtol")
    assert "float32 cannot reach the tolerance 1e-09" in found["what"]
    reachable = re.fullmatch(r"--dtype float64, or --cg-rtol (\S+)", found["remedy"])
    assert reachable is not None
    # the remedies hold
    assert look(capsys, "ill-conditioned", *flags, "--dtype", "float64")[0] == 0
    assert look(capsys, "ill-conditioned", "--cg-rtol", reachable[1], *flags[2:])[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for GPUs where there are none")
def test_nccl_without_gpus_is_found_and_the_rest_is_looked_at_all_the_same(capsys):
    code, findings, answer = look(capsys, None, "--backend", "nccl")
    assert code == EXIT_CHANGE
    (found,) = [f for f in findings if f["severity"] != "note"]
    assert (found["severity"], found["where"]) == ("error", "--backend")
    assert "needs a GPU per rank: found 0, asked for 1" in found["what"]
    assert found["remedy"] == "use --backend gloo"
    assert [section["title"] for section in answer["sections"]] == ["environment", "collectives"]


def test_a_run_s_configuration_is_taken_as_it_is(capsys, tmp_path):
    """What a run has written, and a flag that makes it wrong."""
    flags = ["--problem", f"{FAULTS}:build", "--options.fault", "ill-conditioned", "--steps", "1"]
    assert train([*flags, "--run-dir", str(tmp_path / "run"), "--checkpoint-every", "0"]) == 0
    capsys.readouterr()
    written = ("--config", str(tmp_path / "run" / "config.yaml"))
    assert look(capsys, None, *written)[0] == 0
    code, findings, _ = look(capsys, None, *written, "--cg-rtol", "1e-9", "--solver", "cg")
    assert code == EXIT_CHANGE
    assert [f["where"] for f in findings if f["severity"] != "note"] == ["--cg-rtol"]


def test_variables_of_a_launcher_that_are_not_whole(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, findings, _ = look(capsys, None)
    assert code == EXIT_CHANGE
    assert any("RANK set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not" in f["what"] for f in findings)


def test_the_report_ends_with_what_to_change(capsys):
    flags = ("--problem", f"{FAULTS}:build", "--options.fault", "sum", "--threads", "1")
    assert main(["doctor", *flags]) == EXIT_CHANGE
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("to change") + 1].startswith(
        "  1 error                 loss(outputs, batch): divide it by"
    )
    assert "ready" not in lines


def test_a_fault_that_is_no_matter_of_derivatives_is_told_once(capsys):
    flags = ("--problem", f"{FAULTS}:build", "--options.fault", "shapes", "--threads", "1")
    assert main(["doctor", *flags]) == EXIT_CHANGE
    out = capsys.readouterr().out
    changes = " ".join(out[out.index("to change") :].split())
    assert changes.count("error") == 1
    assert "mat1 and mat2 shapes cannot be multiplied" in changes
    assert "differentiated twice" not in out


def test_a_problem_that_cannot_be_built_is_a_finding(capsys):
    code, findings, _ = look(capsys, None, "--problem", "nowhere.py:build")
    assert code == EXIT_CHANGE
    (found,) = [f for f in findings if f["severity"] != "note"]
    assert "problem file 'nowhere.py' does not exist" in found["what"]


def test_the_module_is_left_as_it_was():
    """Parameters, buffers, their dtype and the mode of each module, through the checks that change them on the way."""
    from dhf.doctor.loss import look_at_loss
    from dhf.doctor.numerics import compare_with_differences
    from tests.doctor.faults import build

    problem = build("batchnorm")
    module = problem.objective.module
    module.append(torch.nn.Dropout(0.2))
    before = {name: (t.data_ptr(), t.clone()) for name, t in [*module.named_parameters(), *module.named_buffers()]}
    x, y = problem.train
    look_at_loss(problem.objective, (x, y), ((x[:6], y[:6]), (x[6:], y[6:])), 0)
    compare_with_differences(problem.objective, lambda dtype: (x.to(dtype), y.to(dtype)), "ggn", 0)
    after = dict([*module.named_parameters(), *module.named_buffers()])
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer
        assert torch.equal(after[name], value)
    assert all(m.training for m in module.modules())
