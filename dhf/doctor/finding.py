"""Finding, Section: what a check tells: facts to read, and what stands in the way, with its remedy."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from dhf.errors import NonFiniteError, RankError, UsageError

__all__ = ["ERROR", "MEND", "NOTE", "WARNING", "Finding", "Section", "merge", "names", "of_error"]

ERROR, WARNING, NOTE = "error", "warning", "note"
MEND = "mend it, and look again"  # where the error itself is all that is known
_MOST = 3  # names in a list


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: ``"error"``: dhf refuses it, or its numbers would be wrong; ``"warning"``: it works, and should be changed
            all the same; ``"note"``: good to know.
        what: What was found.
        where: The module, parameter, flag or rank.
        remedy: What to do.
    """

    severity: str
    what: str
    where: str
    remedy: str

    @property
    def must_change(self) -> bool:
        """Whether it stands between the user and being ready."""
        return self.severity != NOTE


@dataclasses.dataclass(slots=True)
class Section:
    """One theme's facts, as label and text, and its findings."""

    title: str
    facts: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def fact(self, label: str, text: str) -> None:
        """Add a fact."""
        self.facts.append((label, text))

    def find(self, severity: str, what: str, where: str, remedy: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(severity, what, where, remedy))


def merge(sections: Sequence[Section]) -> Section:
    """One section of what all ranks have found: rank 0's facts, and each finding once, with its rank where not all have it."""
    merged = Section(sections[0].title, list(sections[0].facts))
    for finding in dict.fromkeys(f for section in sections for f in section.findings):
        ranks = [rank for rank, section in enumerate(sections) if finding in section.findings]
        if len(ranks) < len(sections):
            on = f"rank {', '.join(map(str, ranks))}"
            finding = dataclasses.replace(finding, where=f"{finding.where} ({on})")
        merged.findings.append(finding)
    return merged


def names(kind: str, paths: Iterable[str]) -> str:
    """``module 'a', 'b' and 3 more``; the root of a module has no name."""
    found = list(paths)
    shown = [f"'{path}'" if path else "itself" for path in found[:_MOST]]
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return f"{kind} {', '.join(shown)}{more}"


def of_error(error: Exception, where: str, remedy: str = MEND) -> Finding:
    """The finding that an error stands for: dhf's own say what was found, where, and after a semicolon what to do."""
    words = " ".join(str(error).split())
    if isinstance(error, (UsageError, NonFiniteError)):
        what, _, told = words.partition("; ")
        place = re.search(r"(submodule|parameter) '([^']*)'", what)
        flag = re.match(r"(?:rank \d+: )?(--[\w-]+)", what)
        if place is not None:
            where = f"{place[1].removeprefix('sub')} '{place[2]}'"
        elif flag is not None:
            where = flag[1]
        return Finding(ERROR, what, where, told or remedy)
    if not isinstance(error, RankError):
        words = f"{type(error).__name__}: {words}"
    return Finding(ERROR, words, where, remedy)
