"""The fenced blocks of README and docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"


class Block(NamedTuple):
    """A fenced block: its language, what stands after that, its first line, and its text."""

    language: str
    name: str
    line: int
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page in their order, without directives."""
    text = page.read_text()
    return [
        Block(match[1], match[2], text[: match.start()].count("\n") + 2, match[3])
        for match in re.finditer(r"^```(\w+) ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
