"""Puts what was measured into README.md, each piece between marks of its own."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent / "README.md"


def put(name: str, text: str) -> None:
    """Replace what lies between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: The page has no such marks.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = README.read_text()
    piece = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not piece.search(page):
        raise ValueError(f"{README} has no {start}")
    README.write_text(piece.sub(lambda _: f"{start}\n{text.strip()}\n{end}", page))
