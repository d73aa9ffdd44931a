"""The map in the README: every folder is on it, and imports go down it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("internlm2_jax", "data_beam")
# Parts of the command line that lie beside what they run.
COMMANDS = ("command.py", "commands.py", "__main__.py", "__init__.py")


def floors() -> dict[str, int]:
    """The number of its row for each folder and file of the packages, "internlm2_jax/train" say."""
    found = {}
    table = (ROOT / "README.md").read_text().partition("## The house")[2]
    for number, row in enumerate(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)):
        package = ""
        for name in re.findall(r"`([^`]+)`", row):
            package, name = name.split("/", 1) if name.startswith(PACKAGES) else (package, name)
            if package:
                found[f"{package}/{name.rstrip('/').removesuffix('.py')}"] = number
    return found


def imported(file: Path) -> set[str]:
    """Folders and files of the packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = node.module in PACKAGES
            names |= {f"{node.module}.{a.name}" for a in node.names} if within else {node.module}
    parts = (name.split(".") for name in names)
    return {"/".join(p[:2]) for p in parts if p[0] in PACKAGES and len(p) > 1}


def test_every_folder_is_on_the_map():
    there = {
        f"{package}/{path.stem}"
        for package in PACKAGES
        for path in (ROOT / package).iterdir()
        if not path.name.startswith("__") and (path.suffix == ".py" or path.is_dir())
    }
    assert there == {name for name in floors() if name.startswith(PACKAGES)}


def test_imports_go_down_the_map():
    rows = floors()
    up = [
        f"{file.relative_to(ROOT)} imports {other}"
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        if file.name not in COMMANDS
        for mine in ["/".join(file.relative_to(ROOT).with_suffix("").parts[:2])]
        for other in sorted(imported(file))
        if other in rows and rows[other] < rows.get(mine, 0)
    ]
    assert not up, "\n".join(up)
