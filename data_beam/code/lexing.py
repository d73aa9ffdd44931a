"""Comments and strings of a program, found with one regular expression per language.

Not a parser: what cannot be told without one (a JavaScript regular expression after a closing
bracket, a shell here-document) is read as code. A mistake ends with its line wherever the language
allows it. All repetitions are possessive, so the time is linear in the text whatever it holds.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

COMMENT, STRING = 1, 2


class Span(NamedTuple):
    """Characters `start` to `end` of the text, the marks of the comment or string included."""

    kind: int
    start: int
    end: int


class Mark(NamedTuple):
    """A comment or string begins with one of the characters `first`; `rest` matches what follows.
    An expression that starts with a set of characters is searched for five times as fast."""

    first: str
    rest: str


# Strings
_DOUBLE = Mark('"', r'(?:[^"\\\n]++|\\.)*+"?+')
_SINGLE = Mark("'", r"(?:[^'\\\n]++|\\.)*+'?+")
_LONG_DOUBLE = Mark('"', r'(?:[^"\\]++|\\.)*+(?:"|\Z)')
_CHARACTER = Mark(
    "'", r"(?:[^'\\\n]|\\[^ux\n]|\\u\{[^}\n]{1,8}\}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{1,2})'"
)
_TRIPLE_DOUBLE = Mark('"', r'""(?:[^"\\]++|\\.|"(?!""))*+(?:"""|\Z)')
_TRIPLE_SINGLE = Mark("'", r"''(?:[^'\\]++|\\.|'(?!''))*+(?:'''|\Z)")
_TRIPLE_RAW = Mark('"', r'""(?:[^"]++|"(?!""))*+(?:"""|\Z)')
_BACKTICK_RAW = Mark("`", r"[^`]*+(?:`|\Z)")
# With one level of templates nested in ${}.
_TEMPLATE = Mark(
    "`",
    r"(?:[^`\\$]++|\\.|\$\{(?:[^{}`]++|`[^`]*+`|\{[^{}]*+\})*+\}|\$)*+(?:`|\Z)",
)
_CPP_RAW = Mark(
    '"', r'(?<=R")(?P<mark>[^()\\\s"]{0,16})\((?:[^)]++|\)(?!(?P=mark)"))*+(?:\)(?P=mark)"|\Z)'
)
_RUST_HASHES = Mark(
    "#", r'(?<=r#)(?P<hashes>#{0,7})"(?:[^"]++|"(?!#(?P=hashes)))*+(?:"#(?P=hashes)|\Z)'
)
_RUST_RAW = Mark('"', r'(?<=\br")[^"]*+(?:"|\Z)')
# A slash begins a regular expression after an operator, an opening bracket or `return`.
_JS_REGEX = Mark(
    "/",
    r"(?:(?<=[=(,:;!&|?{}\[+\n]/)|(?<=[=(,:;!&|?{}\[+] /)|(?<=return /)|(?<=[\n ]  /))"
    r"(?![/*])(?:[^/\\\[\n]++|\\.|\[(?:[^\]\\\n]++|\\.)*+\])++/",
)
_QUOTED = Mark("'", r"[^'\n]*+'?+")
_QUOTED_DOUBLE = Mark('"', r'[^"\n]*+"?+')

# Comments
_LINE = r"[^\n]*+"
_SLASHES = Mark("/", "/" + _LINE)
_C_LINE = Mark("/", r"/(?:[^\\\n]++|\\.)*+")  # a backslash before the line end continues it
_SPACED_SLASHES = Mark("/", r"/(?<![^\s;]//)" + _LINE)  # not the one of http://
_STARS = Mark("/", r"\*(?:[^*]++|\*(?!/))*+(?:\*/|\Z)")
_HASH = Mark("#", _LINE)
_SPACED_HASH = Mark("#", r"(?<![^\s;]#)" + _LINE)
_DASHES = Mark("-", "-" + _LINE)
_PERCENT = Mark("%", r"(?<!\\%)" + _LINE)
_SEMICOLON = Mark(";", _LINE)
_PARENS = Mark("(", r"\*(?:[^*]++|\*(?!\)))*+(?:\*\)|\Z)")
_MARKUP = Mark("<", r"!--(?:[^-]++|-(?!->))*+(?:-->|\Z)")
_BRACES = Mark("{", r"[^}]*+(?:\}|\Z)")


class Syntax(NamedTuple):
    """Alternatives in order of trial; comments are tried before strings."""

    comments: tuple[Mark, ...]
    strings: tuple[Mark, ...] = ()


_C = Syntax((_C_LINE, _STARS), (_DOUBLE, _CHARACTER))
_CPP = Syntax((_C_LINE, _STARS), (_CPP_RAW, _DOUBLE, _CHARACTER))
_JAVA = Syntax((_SLASHES, _STARS), (_TRIPLE_DOUBLE, _DOUBLE, _CHARACTER))
_JS = Syntax((_SLASHES, _STARS), (_TEMPLATE, _DOUBLE, _SINGLE, _JS_REGEX))
_PYTHON = Syntax((_HASH,), (_TRIPLE_DOUBLE, _TRIPLE_SINGLE, _DOUBLE, _SINGLE))
_SCRIPT = Syntax((_SPACED_HASH,), (_DOUBLE, _SINGLE))
_SYNTAX_OF: dict[tuple[str, ...], Syntax] = {
    ("c", "objective-c", "opencl", "glsl", "hlsl", "metal", "wgsl", "lex", "yacc"): _C,
    ("c++", "cuda", "objective-c++"): _CPP,
    (
        "java", "kotlin", "scala", "groovy", "swift", "dart", "c#", "d", "solidity", "protobuf",
        "thrift", "actionscript", "verilog", "systemverilog", "zig", "vlang", "apex",
    ): _JAVA,
    ("javascript", "typescript", "svelte", "vue"): _JS,
    ("go",): Syntax((_SLASHES, _STARS), (_BACKTICK_RAW, _DOUBLE, _CHARACTER)),
    ("go module",): Syntax((_SLASHES,)),
    ("rust",): Syntax(
        (_SLASHES, _STARS), (_RUST_HASHES, _RUST_RAW, _LONG_DOUBLE, _CHARACTER)
    ),
    ("php",): Syntax((_SLASHES, _STARS, Mark("#", r"(?!\[)" + _LINE)), (_DOUBLE, _SINGLE)),
    ("css",): Syntax((_STARS,), (_DOUBLE, _SINGLE)),
    ("scss", "less", "sass"): Syntax((_STARS, _SPACED_SLASHES), (_DOUBLE, _SINGLE)),
    ("python", "cython", "starlark"): _PYTHON,
    (
        "shell", "ruby", "perl", "r", "yaml", "toml", "make", "cmake", "docker", "awk", "tcl",
        "puppet", "hcl", "graphql", "meson", "requirements", "nix", "crystal", "ini",
    ): _SCRIPT,
    ("elixir", "coffeescript"): Syntax((_SPACED_HASH,), (_TRIPLE_DOUBLE, _DOUBLE, _SINGLE)),
    ("julia",): Syntax(
        (Mark("#", r"=(?:[^=]++|=(?!#))*+(?:=#|\Z)"), _HASH), (_TRIPLE_DOUBLE, _DOUBLE, _CHARACTER)
    ),
    ("nim",): Syntax((_HASH,), (_TRIPLE_RAW, _DOUBLE, _CHARACTER)),
    ("powershell",): Syntax(
        (Mark("<", r"#(?:[^#]++|#(?!>))*+(?:#>|\Z)"), _SPACED_HASH), (_DOUBLE, _SINGLE)
    ),
    ("sql",): Syntax((_DASHES, _STARS), (Mark("'", r"[^']*+'?+"), _QUOTED_DOUBLE)),
    ("lua",): Syntax(
        (Mark("-", r"-\[\[(?:[^\]]++|\](?!\]))*+(?:\]\]|\Z)"), _DASHES), (_DOUBLE, _SINGLE)
    ),
    ("haskell", "elm"): Syntax(
        (
            Mark("{", r"-(?:[^-]++|-(?!\}))*+(?:-\}|\Z)"),
            Mark("-", r"-++(?![!#$%&*+./<=>?@^|~])" + _LINE),
        ),
        (_DOUBLE, _CHARACTER),
    ),
    ("lean",): Syntax((Mark("/", r"-(?:[^-]++|-(?!/))*+(?:-/|\Z)"), _DASHES), (_DOUBLE,)),
    ("ada", "vhdl"): Syntax((_DASHES,), (_QUOTED_DOUBLE,)),
    ("lisp", "clojure", "scheme", "racket"): Syntax((_SEMICOLON,), (_LONG_DOUBLE,)),
    ("assembly",): Syntax(
        (_STARS, _SEMICOLON, _SPACED_HASH, _SPACED_SLASHES, Mark("@", r"(?<![^\s]@)" + _LINE)),
        (_DOUBLE,),
    ),
    ("llvm",): Syntax((_SEMICOLON,), (_DOUBLE,)),
    ("webassembly",): Syntax((Mark(";", ";" + _LINE),), (_DOUBLE,)),
    ("tex",): Syntax((_PERCENT,)),
    ("matlab",): Syntax((Mark("%", _LINE),), (_DOUBLE, Mark("'", r"(?<=[=(,\[{;\s]')[^'\n]*+'"))),
    ("erlang", "prolog", "mercury"): Syntax((Mark("%", _LINE), _STARS), (_DOUBLE, _SINGLE)),
    ("ocaml", "coq", "mathematica"): Syntax((_PARENS,), (_LONG_DOUBLE,)),
    ("f#",): Syntax((_PARENS, _SLASHES), (_TRIPLE_DOUBLE, _DOUBLE)),
    ("pascal",): Syntax((_PARENS, _BRACES, _SLASHES), (_QUOTED,)),
    ("fortran",): Syntax(
        (Mark("!", _LINE), Mark("cC*", r"(?<![^\n].)(?=[\s*!-])" + _LINE)),
        (_QUOTED_DOUBLE, _QUOTED),
    ),
    ("vim",): Syntax((Mark('"', r"(?<![^\n]\")(?:[^\n]*+)"),), (_QUOTED,)),
    ("batch",): Syntax(
        (Mark(":", r"(?<![^\n]:):" + _LINE), Mark("rR", r"(?<![^\n@].)[eE][mM]\b" + _LINE))
    ),
    ("visual basic",): Syntax((Mark("'", _LINE),), (_QUOTED_DOUBLE,)),
    ("html", "xml", "qt translation"): Syntax((_MARKUP,)),
    ("cobol",): Syntax((Mark("*", r"(?<=^.{6}\*)" + _LINE),)),
}  # fmt: skip
_SYNTAX = {lang: syntax for languages, syntax in _SYNTAX_OF.items() for lang in languages}


def _alternatives(marks: tuple[Mark, ...]) -> str:
    return "|".join(f"(?<=[{re.escape(mark.first)}]){mark.rest}" for mark in marks)


@functools.cache
def _expression(lang: str) -> re.Pattern[str] | None:
    """The first group takes part when a comment was found."""
    syntax = _SYNTAX.get(lang)
    if syntax is None:
        return None
    first = "".join(sorted({c for mark in syntax.comments + syntax.strings for c in mark.first}))
    pattern = f"[{re.escape(first)}](?:({_alternatives(syntax.comments)})"
    if syntax.strings:
        pattern += "|" + _alternatives(syntax.strings)
    return re.compile(pattern + ")", re.MULTILINE | re.DOTALL)


def known(lang: str) -> bool:
    """Whether the comments of `lang` can be found."""
    return lang in _SYNTAX


def scan(text: str, lang: str) -> list[Span]:
    """Comments and strings in order; none for a language that is not known."""
    expression = _expression(lang)
    if expression is None:
        return []
    return [
        Span(STRING if match[1] is None else COMMENT, *match.span())
        for match in expression.finditer(text)
    ]


_NOT_LINE_END = re.compile(r"[^\n]++")


def _spaces(match: re.Match[str]) -> str:
    return " " * (match.end() - match.start())


def blank(text: str, spans: list[Span], keep_quotes: bool = False) -> str:
    """The text with spaces in place of the spans' characters: same length, same lines. With
    `keep_quotes` the first and the last character of a string stay."""
    pieces = []
    position = 0
    for kind, start, end in spans:
        if keep_quotes and kind == STRING and end - start >= 2:
            start, end = start + 1, end - 1
        pieces.append(text[position:start])
        inside = text[start:end]
        if "\n" in inside:
            pieces.append(_NOT_LINE_END.sub(_spaces, inside))
        else:
            pieces.append(" " * (end - start))
        position = end
    pieces.append(text[position:])
    return "".join(pieces)
