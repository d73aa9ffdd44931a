"""Jupyter notebooks as Markdown: text cells as prose, code cells in fenced blocks, no outputs."""

from __future__ import annotations

from typing import Any

import orjson


def to_markdown(text: str) -> str | None:
    """None when `text` is no notebook of format 3 or later."""
    try:
        notebook = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(notebook, dict):
        return None
    cells = notebook.get("cells")
    if cells is None and isinstance(sheets := notebook.get("worksheets"), list) and sheets:
        cells = sheets[0].get("cells") if isinstance(sheets[0], dict) else None
    if not isinstance(cells, list):
        return None
    lang = _language(notebook.get("metadata"))
    parts = []
    for cell in cells:
        if not isinstance(cell, dict):
            continue
        source = cell.get("source", cell.get("input", ""))
        if isinstance(source, list):
            source = "".join(line for line in source if isinstance(line, str))
        if not isinstance(source, str) or not source.strip():
            continue
        kind = cell.get("cell_type")
        parts.append(fenced(source, lang) if kind == "code" else source.strip("\n"))
    return "\n\n".join(parts) + "\n" if parts else None


def _language(metadata: Any) -> str:
    for section in ("language_info", "kernelspec"):
        part = metadata.get(section) if isinstance(metadata, dict) else None
        if isinstance(part, dict):
            name = part.get("name" if section == "language_info" else "language")
            if isinstance(name, str) and name.isascii() and len(name) < 20:
                return name.lower()
    return "python"


def fenced(text: str, tag: str) -> str:
    """A fenced block that the content cannot close: its fence is longer than any run of backticks
    in the text."""
    fence = "`" * max(3, longest_run(text) + 1)
    body = text.strip("\n")
    return f"{fence}{tag}\n{body}\n{fence}"


def longest_run(text: str) -> int:
    """Of backticks."""
    run = 0
    while "`" * (run + 1) in text:
        # Double, then close in: a text may hold a run of millions.
        step = 1
        while "`" * (run + 2 * step) in text:
            step *= 2
        run += step
    return run
