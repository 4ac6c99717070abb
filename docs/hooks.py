"""What mkdocs does not do by itself: pages link to files of the repository outside of docs/, and these come along.

A link such as ``../benchmarks/results/products.md`` is right on a page in the repository, and would lead out of the site; so the
file is taken into the site under ``repository/``, and the link with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
_OUTSIDE = re.compile(r"(\]\()\.\./([^)#\s]+)")
_BESIDE = re.compile(r"!\[[^\]]*\]\(([^)/\s]+)\)")  # pictures beside a page that comes along
_AS_PAGE, _AS_IT_IS = (".md",), (".png", ".svg", ".json")


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside of docs/ that pages link to, and the pictures of those that are pages."""
    wanted: set[str] = set()
    for page in [*Path(config["docs_dir"]).glob("*.md")]:
        wanted |= {path for _, path in _OUTSIDE.findall(page.read_text(encoding="utf-8"))}
    for path in sorted(wanted):
        if path.endswith(_AS_PAGE):
            text = (ROOT / path).read_text(encoding="utf-8")
            wanted |= {str(Path(path).parent / picture) for picture in _BESIDE.findall(text)}
    for path in sorted(wanted):
        if (ROOT / path).is_file():
            name = _name(path)
            file = File.generated(config, name, abs_src_path=str(ROOT / path))
            file.inclusion = InclusionLevel.NOT_IN_NAV  # reached by links
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to where their files are now."""
    return _OUTSIDE.sub(lambda found: found[1] + _name(found[2]), markdown)


def _name(path: str) -> str:
    """Where a file of the repository stands in the site; what a browser would not show becomes a text file."""
    return f"repository/{path}" if path.endswith(_AS_PAGE + _AS_IT_IS) else f"repository/{path}.txt"
