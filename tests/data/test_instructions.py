import pytest

from internlm2_jax.data import instructions, tasks
from internlm2_jax.data.instructions import extract, first_sentence, module_name, python_files

CODE = '''
"""A module."""

def area(width: float, height: float = 1.0, *, unit="m") -> float:
    """Compute the area of a rectangle in square units.

    More words that nobody asks for.
    """
    return width * height

def _private(x):
    """Compute something that is not public at all."""

def silent(x):
    return x

class Shape:
    """Something that has an area. And a name."""

    def scale(self, factor, *args, **kwargs):
        """Return the shape, scaled by
        a factor."""
'''

MAN = """LS(1)

NAME
       ls, dir - list the contents of folders

SYNOPSIS
"""

TEXT = """# Grain

Grain is a library for reading and shuffling training data. It is fast.

This is a sentence that defines nothing at all.

Beam Runner is the part that carries out
a pipeline on some machine.
"""


def of_family(items, family):
    return {item.prompt: item.answer for item in items if item.family == family}


def test_code_yields_docstrings_signatures_modules_and_classes():
    found, counts = extract([("code", "lib/python3.11/shapes/flat.py", CODE)], 100)
    docstrings = of_family(found, "docstring")
    assert set(docstrings.values()) == {
        "Compute the area of a rectangle in square units.",
        "Return the shape, scaled by a factor.",
    }
    assert any("`area(width, height, unit)`" in prompt for prompt in docstrings)
    assert any("`Shape.scale(factor, *args, **kwargs)`" in prompt for prompt in docstrings)
    assert of_family(found, "class").popitem()[1] == "Something that has an area."
    assert of_family(found, "signature") == {
        "Write the signature of a Python function for this: "
        "Compute the area of a rectangle in square units.": "def area(width, height, unit):"
    }
    assert of_family(found, "module")["Which module defines `Shape`?"] == "shapes.flat"
    assert counts["documents"] == 1 and counts["docstring"] == 2
    assert not any("private" in i.prompt or "silent" in i.prompt for i in found)


def test_all_questions_about_one_function_share_a_key():
    found, _ = extract([("code", "shapes/flat.py", CODE)], 100)
    keys = {i.key for i in found if "area" in i.prompt and "rectangle" in i.prompt + i.answer}
    assert keys == {"shapes.flat.area"}


def test_text_yields_definitions_commands_and_titles():
    found, _ = extract([("text", "doc/grain.md", TEXT), ("text", "man1/ls.1", MAN)], 100)
    assert of_family(found, "definition") == {
        "What is Grain?": "Grain is a library for reading and shuffling training data.",
        "What is Beam Runner?": "Beam Runner is the part that carries out a pipeline on some "
        "machine.",
    }
    assert list(of_family(found, "command").values()) == ["list the contents of folders."]
    assert list(of_family(found, "title")) == ["What is Grain about?"]


@pytest.mark.parametrize(
    "bad",
    [
        "def f(:\n",
        "x = '\0'",
        "print 'old'",
        "(" * 5000 + ")" * 5000,
        "\udc80 = 1",
        "if x:\n\ty\n  z",
    ],
)
def test_files_that_do_not_parse_are_counted_and_skipped(bad):
    found, counts = extract([("code", "bad.py", bad), ("code", "good.py", CODE)], 100)
    assert counts["syntax_errors"] == 1 and counts["documents"] == 2
    assert of_family(found, "docstring")


def test_invalid_escapes_do_not_warn(recwarn):
    extract([("code", "escape.py", 'x = "\\d"\n')], 10)
    assert not recwarn.list


def test_a_repository_as_one_markdown_text():
    text = f"# repo\n\nshapes/flat.py\n\n```python\n{CODE}```\n\nold.py\n```python\ndef f(:\n```\n"
    assert [path for path, _ in python_files("repo.md", text)] == ["shapes/flat.py", "old.py"]
    found, counts = extract([("code", "repo.md", text)], 100)
    assert of_family(found, "module")["Which module defines `area`?"] == "shapes.flat"
    assert counts["syntax_errors"] == 1


def test_names_defined_twice_are_not_asked_for_and_prompts_are_distinct():
    found, _ = extract([("code", "a/one.py", CODE), ("code", "b/two.py", CODE)], 100)
    assert not of_family(found, "module")
    assert len({i.prompt for i in found}) == len(found)


def test_an_answer_repeats_at_most_twice():
    same = [
        ("code", f"m{n}.py", f'def f{n}(x):\n    """Return the value of x."""\n') for n in range(9)
    ]
    found, _ = extract(same, 1000)
    assert sum(i.answer == "Return the value of x." for i in found) == instructions.PER_ANSWER


def test_limits_hold_per_document_and_per_family():
    body = "".join(
        f'def name{n}(x):\n    """Return the {w} of x."""\n' for n, w in enumerate(tasks.WORDS)
    )
    found, _ = extract([("code", "long.py", body)], 1000)
    assert 0 < len(found) <= instructions.PER_DOCUMENT
    many = [
        ("code", f"m{n}.py", f'def g{n}(x):\n    """Return the {w}."""\n')
        for n, w in enumerate(tasks.WORDS)
    ]
    found, counts = extract(many, 40)
    assert len(found) <= 40
    assert all(counts.get(f, 0) <= share * 40 + 1 for f, share in instructions.MOST.items())


def test_no_code_and_nothing_at_all():
    assert extract([], 10) == ([], {"documents": 0, "syntax_errors": 0})
    found, _ = extract([("text", "poem.txt", "roses are red\n\nviolets are blue\n")], 10)
    assert found == []


def test_order_and_repetition_are_deterministic():
    documents = [("code", "a.py", CODE), ("text", "g.md", TEXT)]
    assert extract(documents, 50) == extract(iter(documents), 50)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("Return x. And more.", ""),  # two words
        ("Return a number, e.g. of the day", "Return a number, e.g. of the day."),
        ("Return the sum of\n    two numbers.\n\nMore.", "Return the sum of two numbers."),
        ("Read version 3.11 of the file", "Read version 3.11 of the file."),
        (":param x: the thing to use", ""),
        (">>> run(1, 2, 3)", ""),
        ("Überall ist es schön heute.", ""),
        ("word " * 40, ""),
        (None, ""),
        ("", ""),
    ],
)
def test_first_sentence(text, expected):
    assert first_sentence(text) == expected


@pytest.mark.parametrize(
    "path,module",
    [
        ("json/decoder.py", "json.decoder"),
        ("usr/lib/python3.11/json/__init__.py", "json"),
        (".venv/lib/python3.11/site-packages/a/b.py", "a.b"),
        ("project/src/pack/mod.py", "pack.mod"),
        ("my-scripts/run.py", ""),
        ("", ""),
    ],
)
def test_module_names(path, module):
    assert module_name(path) == module
