"""Repositories into Markdown documents: order, fences, licences, borders, sizes."""

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam.code.assemble import Options, assemble, close_fence, language_of, markdown, order
from data_beam.code.notebook import fenced, longest_run, to_markdown
from data_beam.schema import Document, Drop, document_id
from internlm2_jax.errors import UserError

ROOT = Path(__file__).parents[2]
MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy. This permission\nnotice shall be included in all copies or substantial portions of the Software.\n"


def file(path: str, text: str, repo: str = "shop", **fields) -> Document:
    dump = fields.get("dump", "")
    return Document(
        document_id("code", path, text, repo, dump), text, "code", repo=repo, path=path, **fields
    )


def documents(files, options: Options | None = None) -> tuple[list[Document], list[Drop]]:
    found = list(assemble(sorted(files, key=lambda d: d.id), options))
    return [d for d in found if isinstance(d, Document)], [d for d in found if isinstance(d, Drop)]


def headings(text: str) -> list[str]:
    """Of files: those outside fences, in a code span."""
    return re.findall(r"(?m)^## `+(.+?)`+$", text)


SHOP = [
    file("README.md", "# Shop\n\nSells things.\n"),
    file("LICENSE", MIT),
    file("setup.py", "from setuptools import setup\nsetup()\n"),
    file("docs/guide.rst", "Guide\n=====\n"),
    file("shop/__init__.py", "from .cart import Cart\n"),
    file("shop/cart.py", "from .price import total\n\n\nclass Cart:\n    pass\n"),
    file("shop/price.py", "def total(x):\n    return sum(x)\n"),
    file("shop/NOTES.md", "Prices are net.\n"),
    file("shop/readme.md", "The package.\n"),
    file("shop/tests/test_cart.py", "from shop import Cart\n"),
    file("shop/tests/README", "Run pytest.\n"),
    file("tools/build.sh", "#!/bin/sh\nmake\n"),
]


def test_one_document_per_repository():
    (document,), drops = documents(SHOP)
    assert headings(document.text) == [
        "README.md",  # of the whole
        "docs/guide.rst",  # of a folder without code: with the README of the folder above
        "setup.py",
        "shop/readme.md", "shop/NOTES.md",  # before the first code of their folder
        "shop/price.py", "shop/cart.py", "shop/__init__.py",
        "tools/build.sh",
        "shop/tests/README", "shop/tests/test_cart.py",
    ]  # fmt: skip
    assert document.text.startswith("# shop\n\n## `README.md`\n\n# Shop\n\nSells things.\n\n## ")
    assert (
        "## `shop/price.py`\n\n```python\ndef total(x):\n    return sum(x)\n```\n" in document.text
    )
    assert "```bash\n#!/bin/sh\nmake\n```\n" in document.text
    assert document.license == "MIT" and document.repo == "shop" and document.lang == "python"
    assert document.meta["files"] == 11 and document.meta["part"] == 1
    assert [(drop.reason, drop.id) for drop in drops] == [("licence_text", SHOP[1].id)]


def test_the_result_does_not_depend_on_ids_or_names_of_other_repositories():
    alone, _ = documents(SHOP)
    others = [file("a.py", "x = 1\n", repo=f"other{n}") for n in range(5)]
    loose = file("page", "Question and answer.", repo="")
    together, _ = documents([*others, *SHOP, loose])
    assert alone[0] in together and len(together) == 7
    assert loose in together  # unchanged


def test_documents_must_be_sorted():
    with pytest.raises(UserError, match="not sorted by id"):
        list(assemble(sorted(SHOP, key=lambda d: d.id, reverse=True)))


def test_repositories_of_different_sources_stay_apart():
    one = file("a.py", "x = 1\n")
    other = one._replace(source="private", id=document_id("private", "a.py", "x = 1\n", "shop"))
    found, _ = documents([one, other])
    assert sorted(d.source for d in found) == ["code", "private"]


def test_licences_decide_per_file():
    files = [
        *SHOP,
        file("shop/gpl.py", "# SPDX-License-Identifier: GPL-3.0-only\nx = 1\n"),
        file("vendor/a/COPYING", "GNU GENERAL PUBLIC LICENSE\nVersion 2, June 1991\n"),
        file("vendor/a/a.c", "int x;\n"),
    ]
    (document,), drops = documents(files, Options(allowed=("MIT", "Apache-2.0")))
    assert not {"shop/gpl.py", "vendor/a/a.c"} & set(headings(document.text))
    reasons = {drop.id: drop.reason for drop in drops}
    by_path = {d.path: reasons.get(d.id) for d in files}
    assert by_path["shop/gpl.py"] == by_path["vendor/a/a.c"] == "licence"
    (document,), _ = documents(files)
    assert document.meta["licences"] == "GPL-2.0-only; GPL-3.0-only; MIT"
    unlicensed = [d for d in SHOP if d.path != "LICENSE"]
    (document,), _ = documents(unlicensed, Options(allowed=("MIT",)))
    assert document.license == ""
    nothing, drops = documents(unlicensed, Options(allowed=("MIT",), keep_unlicensed=False))
    assert nothing == [] and {drop.reason for drop in drops} == {"no_licence"}
    # What ingest or an attribute found stands when the files say nothing.
    (document,), _ = documents([d._replace(license="Apache 2.0") for d in unlicensed])
    assert document.license == "Apache-2.0"


def test_parts_are_cut_between_files():
    files = [file(f"f{n}.py", f"x = '{n}'\n" + "y = 1\n" * 800) for n in range(10)]
    whole, _ = documents(files)
    parts, drops = documents(files, Options(max_bytes=20_000))
    assert not drops and len(parts) > 2
    assert all(part.num_bytes <= 20_000 for part in parts)
    assert [part.meta["part"] for part in parts] == list(range(1, len(parts) + 1))
    assert len({part.id for part in parts}) == len(parts)
    assert list(itertools.chain(*(headings(part.text) for part in parts))) == headings(
        whole[0].text
    )
    assert parts[1].text.startswith("# shop (part 2)\n")
    assert {part.id[:16] for part in parts} == {files[0].id[:16]}  # of the repository


def test_what_does_not_fit_or_holds_nothing_is_accounted_for():
    files = [file("big.py", "x = 1\n" * 5000), file("empty.py", " \n"), file("a.py", "x = 1\n")]
    (document,), drops = documents(files, Options(max_bytes=20_000))
    assert headings(document.text) == ["a.py"]
    assert {(drop.reason, drop.value) for drop in drops} == {
        ("too_large", 30_000.0),
        ("empty", 0.0),
    }
    with pytest.raises(UserError, match="max_bytes"):
        Options(max_bytes=10)


def test_a_repository_beyond_the_memory_limit_is_put_together_in_groups():
    files = [file(f"f{n}.py", "y = 1\n" * 500) for n in range(10)]
    parts, drops = documents(files, Options(max_repository_bytes=9000))
    assert not drops and len(parts) == 4
    assert sorted(itertools.chain(*(headings(p.text) for p in parts))) == sorted(
        f.path for f in files
    )
    assert [part.meta["part"] for part in parts] == [1, 2, 3, 4]


def test_the_newest_dump_of_a_path_wins():
    old, new = file("a.py", "x = 1\n", dump="2020"), file("a.py", "x = 2\n", dump="2021")
    (document,), (drop,) = documents([old, new])
    assert "x = 2" in document.text and document.dump == "2021"
    assert drop == Drop(old.id, "assemble", "older_copy", 0.0, new.id)


def test_epochs_are_averaged_by_size():
    files = [
        file("a.py", "x" * 300, meta={"epochs": 2}),
        file("b.py", "y" * 100, meta={"epochs": 1}),
    ]
    (document,), _ = documents(files)
    assert document.meta["epochs"] == 1.75


# --- Markdown ---


@given(st.text(alphabet="`~ab\n", max_size=60))
def test_nothing_closes_a_fence_but_its_own(text):
    block = fenced(text, "python")
    first, *rest = block.split("\n")
    fence = first.removesuffix("python")
    assert len(fence) >= 3 and rest[-1] == fence
    assert not any(line.strip().startswith(fence) for line in rest[:-1])
    assert "\n".join(rest[:-1]) == text.strip("\n")
    assert longest_run(text) == max(map(len, re.findall("`+", text)), default=0)


def test_documentation_that_leaves_a_fence_open():
    assert close_fence("a\n```python\nx\n") == "a\n```python\nx\n```"
    assert close_fence("~~~~\n```\n~~~\n") == "~~~~\n```\n~~~\n~~~~"
    for closed in ("a\n```\nx\n```\n", "```` a ````", "text ``` text", "```\n~~~\n```"):
        assert close_fence(closed) == closed


def test_files_follow_each_other_whatever_they_hold():
    files = [
        file("README.md", "```\nopen\n"),
        file("odd `name`\n.py", "x = '''```\n````'''\n"),
        file("z.py", "last = 1\n"),
    ]
    text = markdown("a\nb", order(files))
    assert text.startswith("# a b\n")
    assert "## ``odd `name` .py``\n\n`````python\n" in text
    assert text.endswith("\n```python\nlast = 1\n```\n")


def test_notebooks_become_cells():
    text = (
        '{"cells": [{"cell_type": "markdown", "source": ["# Title\\n", "text"]},'
        ' {"cell_type": "code", "source": "x = 1", "outputs": [{"data": {"png": "AAAA"}}]},'
        ' {"cell_type": "code", "source": [1]}, 3], "metadata": {"kernelspec": {"language": "R"}}}'
    )
    assert to_markdown(text) == "# Title\ntext\n\n```r\nx = 1\n```\n"
    for bad in ("", "{", "[]", '{"cells": 1}', '{"worksheets": [1]}', '{"cells": []}'):
        assert to_markdown(bad) is None
    (document,), _ = documents([file("a.ipynb", text), file("b.ipynb", "{")])
    assert "## `a.ipynb`\n\n# Title\ntext\n" in document.text
    assert "## `b.ipynb`\n\n```json\n{\n```\n" in document.text


def test_language_comes_from_the_document_then_from_the_path():
    assert language_of(file("a.h", "class A {\n};", lang="c++")) == "c++"
    assert language_of(file("a.py", "x", lang="und")) == "python"
    assert language_of(file("README.md", "x", lang="python")) == ""


# --- Real repositories ---


def test_this_project():
    folder = ROOT / "internlm2_jax"
    files = [
        file(f"internlm2_jax/{path.relative_to(folder).as_posix()}", path.read_text(), "internlm2")
        for path in sorted(folder.rglob("*.py"))
        if path.read_text().strip()
    ]
    files.append(file("README.md", (ROOT / "README.md").read_text(), "internlm2"))
    (document,), drops = documents(files)
    found = headings(document.text)
    assert not drops and sorted(found) == sorted(d.path for d in files)
    assert found[0] == "README.md"
    place = {path: number for number, path in enumerate(found)}
    package = "internlm2_jax"
    assert (
        place[f"{package}/errors.py"] < place[f"{package}/config.py"] < place[f"{package}/cli.py"]
    )
    assert place[f"{package}/models/layers.py"] < place[f"{package}/models/decoder.py"]
    for one in files:  # every file whole, once
        assert document.text.count(one.text.strip("\n")) >= 1


PATHS = st.sampled_from(
    ["README.md", "a.py", "b/c.py", "b/__init__.py", "b/README.rst", "d/e.c", "d/e.h", "docs/x.md", "LICENSE", "x"]
)  # fmt: skip
TEXTS = st.sampled_from(
    ["from b import c\n", '#include "e.h"\n', "import a\n", "```\n", " ", "x = 1\r\n"]
)


@given(
    st.lists(st.tuples(PATHS, TEXTS, st.sampled_from(["r1", "r2", ""])), max_size=12, unique=True)
)
def test_nothing_is_lost_silently(items):
    files = [file(path, text, repo) for path, text, repo in items]
    found, drops = documents(files)
    dropped = {drop.id for drop in drops}
    for repo in ("r1", "r2"):
        kept = {d.path for d in files if d.repo == repo and d.id not in dropped}
        listed = [path for d in found if d.repo == repo for path in headings(d.text)]
        assert sorted(listed) == sorted(kept)
    assert [d for d in files if not d.repo] == [d for d in files if d in found]
    assert dropped <= {d.id for d in files} and len(drops) == len(dropped)
