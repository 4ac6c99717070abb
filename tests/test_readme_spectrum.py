"""The README's example of spectrum, traces and influence runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    section = text.split("## Spectrum, traces and influence")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    printed = capsys.readouterr().out
    assert "RESIDUAL_TOLERANCE" in printed
    assert "TraceEstimate(value=" in printed
    assert "(51, 51)" in printed
    assert "torch.Size([5, 500])" in printed
    assert names["pairs"].converged  # type: ignore[attr-defined]
    assert all(s.converged for s in [*names["solutions"], *names["found"].solutions])  # type: ignore[attr-defined,misc]
