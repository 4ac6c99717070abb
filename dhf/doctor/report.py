"""The examination as aligned text for people, and as plain values for JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from dhf.doctor.examine import Examination
from dhf.doctor.finding import ERROR, MEND, Finding

__all__ = ["as_dict", "in_lines"]

_LABEL, _WIDTH = 22, 120


def in_lines(examination: Examination) -> Iterator[str]:
    """The report; its last lines say what to change, or its last is ``ready``."""
    for section in examination.sections:
        if not section.facts and not section.findings:
            continue
        yield section.title
        for label, text in section.facts:
            yield from _aligned(label, text)
        for finding in section.findings:
            yield from _aligned(finding.severity, _in_words(finding))
        yield ""
    if examination.advice is not None:
        yield "recommended"
        yield from _aligned("flags", str(examination.advice))
        yield ""
    changes = [f for section in examination.sections for f in section.findings if f.must_change]
    changes.sort(key=lambda finding: finding.severity != ERROR)
    if not changes:
        yield "ready"
        return
    yield "to change"
    for number, (severity, text) in enumerate(dict.fromkeys((f.severity, _change(f)) for f in changes), 1):
        yield from _aligned(f"{number} {severity}", text)


def as_dict(examination: Examination, exit_code: int) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "ready": examination.ready,
        "exit_code": exit_code,
        "sections": [
            {
                "title": section.title,
                "facts": [{"label": label, "text": text} for label, text in section.facts],
                "findings": [dataclasses.asdict(finding) for finding in section.findings],
            }
            for section in examination.sections
        ],
        "recommended": None if examination.advice is None else examination.advice.flags,
    }


def _change(finding: Finding) -> str:
    """What to change; what was found, where that is all there is to go by."""
    return f"{finding.where}: {finding.what if finding.remedy == MEND else finding.remedy}"


def _in_words(finding: Finding) -> str:
    where = "" if finding.what.startswith(finding.where) else f"{finding.where}: "
    return f"{where}{finding.what}; {finding.remedy}"


def _aligned(label: str, text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, _WIDTH - _LABEL - 4, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"  {label:<{_LABEL}}  {first}", *(" " * (_LABEL + 4) + line for line in rest)]
