"""Comments and strings, against Python's own tokenizer, by hand elsewhere, and on hostile texts."""

import io
import json
import time
import tokenize
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam.code import lexing
from data_beam.code.lexing import COMMENT, STRING

STANDARD = Path(json.__file__).parents[1]
LANGUAGES = sorted(lexing._SYNTAX)


def comments(text: str, lang: str) -> list[str]:
    return [text[s.start : s.end] for s in lexing.scan(text, lang) if s.kind == COMMENT]


def strings(text: str, lang: str) -> list[str]:
    return [text[s.start : s.end] for s in lexing.scan(text, lang) if s.kind == STRING]


@pytest.mark.parametrize(
    "name", ["argparse", "ast", "inspect", "json/encoder", "re/_parser", "tarfile"]
)
def test_python_agrees_with_the_tokenizer_of_python(name):
    text = (STANDARD / f"{name}.py").read_text()
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    assert comments(text, "python") == [t.string for t in tokens if t.type == tokenize.COMMENT]
    assert len(strings(text, "python")) == outer_strings(tokens)


def outer_strings(tokens: list[tokenize.TokenInfo]) -> int:
    """Strings that lie in no f-string, whose parts are tokens since Python 3.12."""
    start, end = (getattr(tokenize, f"FSTRING_{name}", None) for name in ("START", "END"))
    count = depth = 0
    for token in tokens:
        count += not depth and token.type in (tokenize.STRING, start)
        depth += (token.type == start) - (token.type == end)
    return count


@pytest.mark.parametrize(
    ("lang", "text", "expected"),
    [
        ("c", 'char *s = "/* no */"; /* yes */ int c = \'"\'; // end', ["/* yes */", "// end"]),
        ("c", "// goes \\\n on\nint x;", ["// goes \\\n on"]),
        ("c++", 'auto s = R"x(// " )" no)x"; // yes', ["// yes"]),
        ("java", 'String s = """\n// no " no\n"""; // yes', ["// yes"]),
        ("javascript", "var r = /[/'\"]+/; // yes", ["// yes"]),
        ("javascript", "a = b / c; // yes\nd = 'x' / 2", ["// yes"]),
        ("javascript", "`a ${f(`// no`)} // no`; /* yes */", ["/* yes */"]),
        ("typescript", "const u = 'http://x'; // yes", ["// yes"]),
        ("go", "s := `// no\n'`; r := '\"' // yes", ["// yes"]),
        ("rust", 'let s = r#"// no " "#; let c: &\'a str = x; // yes', ["// yes"]),
        ("rust", "let c = '\"'; let d = '\\u{41}'; // yes", ["// yes"]),
        ("shell", "echo ${#a} \"# no\" '# no' # yes", ["# yes"]),
        ("sql", "select '--no' -- yes\n/* and */", ["-- yes", "/* and */"]),
        ("lua", "x = '--no' --[[ long\n]] y -- yes", ["--[[ long\n]]", "-- yes"]),
        ("haskell", "x --> y {- block -} -- yes", ["{- block -}", "-- yes"]),
        ("html", "<p>text</p><!-- yes\n --><b>", ["<!-- yes\n -->"]),
        ("tex", "50\\% no % yes", ["% yes"]),
        ("lisp", '(f "; no") ; yes', ["; yes"]),
        ("ocaml", 'let s = "(* no *)" (* yes *)', ["(* yes *)"]),
        ("fortran", "x = 'a!b' ! yes", ["! yes"]),
        ("vim", '" yes\nlet x = "no"', ['" yes']),
        ("batch", ":: yes\nrem and\necho no", [":: yes", "rem and"]),
        ("php", "<?php # yes\n#[Attribute]\n// and", ["# yes", "// and"]),
        ("python", "x = 1", []),
        ("no such language", "# text", []),
    ],
)
def test_comments(lang, text, expected):
    assert comments(text, lang) == expected


def test_blank_keeps_every_place():
    text = 'a = "x\\"y" # é\n"""two\nlines""" + b'
    spans = lexing.scan(text, "python")
    blanked = lexing.blank(text, spans)
    assert blanked == "a = " + " " * 10 + "\n" + " " * 6 + "\n" + " " * 8 + " + b"
    quoted = lexing.blank(text, spans, keep_quotes=True)
    assert quoted == 'a = "' + " " * 4 + '"' + " " * 4 + '\n"' + " " * 5 + "\n" + " " * 7 + '" + b'


@given(
    st.text(alphabet="\"'`#/*\\\n -(){}[]%;!<>aR$rx=:", max_size=200), st.sampled_from(LANGUAGES)
)
def test_spans_are_in_order_and_nothing_moves(text, lang):
    spans = lexing.scan(text, lang)
    ends = [0, *(span.end for span in spans)]
    assert all(end <= span.start < span.end for end, span in zip(ends, spans, strict=False))
    blanked = lexing.blank(text, spans)
    assert len(blanked) == len(text)
    assert [i for i, c in enumerate(text) if c == "\n"] == [
        i for i, c in enumerate(blanked) if c == "\n"
    ]
    outside = set(range(len(text))) - {i for s in spans for i in range(s.start, s.end)}
    assert all(blanked[i] == text[i] for i in outside)


@pytest.mark.parametrize(
    "unit",
    ['"', "'", "/*", "`${", "`", '"""', 'R"(', 'r#"', "\\", "{-", "(*", "<!--", "--[[", "/", " /a"],
)
@pytest.mark.parametrize("lang", ["c++", "javascript", "python", "rust", "haskell", "html", "lua"])
def test_hostile_texts_take_linear_time(lang, unit):
    text = unit * (100_000 // len(unit))
    start = time.process_time()
    lexing.scan(text, lang)
    assert time.process_time() - start < 1.5
