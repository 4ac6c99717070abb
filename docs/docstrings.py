"""What the API page needs of docstrings: examples as code, and names in Sphinx's notation as code, too.

And of names: ``dhf.cg`` is the function, where ``dhf.solvers.cg`` may also be taken for the module that holds it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|mod|exc):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings as they are loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(r"`\1`", text)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for name, member in list(pkg.members.items()):
            if not member.is_alias:
                continue
            path = member.target_path.removeprefix(f"{pkg.path}.")
            try:
                target = pkg[path]
            except KeyError:
                continue
            if not target.is_alias and target.is_module and name in target.members:
                pkg.set_member(name, griffe.Alias(name, f"{target.path}.{name}", parent=pkg))
