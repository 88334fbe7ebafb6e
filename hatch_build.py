"""The readme as package registries show it: they don't have the files that its links lead to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# A link or a picture that leads to a file of this project, with what it shows.
_RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


class ReadmeHook(MetadataHookInterface):
    """Has links lead to the project's source, if `project.urls` has it; else they are texts."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme."""
        source = metadata.get("urls", {}).get("Source")
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, source)}


def absolute(text: str, source: str | None) -> str:
    """Return Markdown without links to files beside it.

    :param source: where those files are to be seen
    """

    def change(match: re.Match[str]) -> str:
        picture, shown, target = match.groups()
        if source is not None:
            return f"{picture}[{shown}]({source.rstrip('/')}/{target})"
        return "" if picture else shown

    return re.sub(r"\n{3,}", "\n\n", _RELATIVE.sub(change, text))
