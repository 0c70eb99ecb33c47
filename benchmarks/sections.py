"""Measured tables inside a text written by hand: a command replaces its own section and nothing else."""

from __future__ import annotations

from pathlib import Path


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- NAME -->` and `<!-- /NAME -->`; at the end of the file where there is no such pair."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    document = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in document and end in document:
        before, rest = document.split(begin, 1)
        document = before + section + rest.split(end, 1)[1]
    else:
        document = f"{document.rstrip()}\n\n{section}\n".lstrip()
    path.write_text(document, encoding="utf-8")
