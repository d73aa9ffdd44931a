"""The import statements of a source file, by regular expression (the InternLM2 report, section
3.1.2), for Python, C and C++, Java, JavaScript and TypeScript, Go, Rust.

Comments and the insides of strings are blanked first, so commented-out imports, documentation and
generated program texts do not count. What an import means in a repository is `resolve`'s part.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_beam.code import lexing


class Import(NamedTuple):
    """`target` as the language writes it: "a.b" or "..a" (Python), "x/y.h" (C), "a.b.C" or "a.b.*"
    (Java), "./x" (JavaScript), "example.com/m/pkg" (Go), "crate::a::B" or "mod x" (Rust).

    `names` are those taken from the target, `aliases` what each is called here. `lazy`: not needed
    to load the file (inside a function, for types only), so a cycle is broken there first. `kind`:
    "" or what the language tells apart, see each reader.
    """

    target: str
    names: tuple[str, ...] = ()
    lazy: bool = False
    kind: str = ""
    aliases: tuple[str, ...] = ()


# Characters before an import on its line; no hand-written program has more.
_MAX_BEFORE = 2000


def _line_start(text: str, position: int) -> int | None:
    """Where the line of `position` begins, None when that is too far away to look."""
    begin = text.rfind("\n", max(0, position - _MAX_BEFORE), position) + 1
    return begin if begin or position <= _MAX_BEFORE else None


# --- Python: kind "from" or "import" ---

# Expressions begin with a literal, for which `re` searches ten times as fast; what must stand
# before it on its line is looked at afterwards.
_PYTHON = re.compile(r"import\b[ \t]*(\([^()]*+\)?|[\w.][^\n;]*+|\*)")
_BEFORE = re.compile(r"([ \t]*+)(?:from[ \t]*(\.*[ \t]*[\w.]*)[ \t]+)?")
_IMPORT_MODULE = re.compile(r"import_module\([ \t]*[rbf]?([\"'])")
_LAZY_BLOCK = re.compile(r"(?:async[ \t]+)?def\b|if[ \t]+(?:\w+\.)*TYPE_CHECKING\b")
_LOOK_BACK = 50_000  # lines, for the blocks that a file's indented imports stand in


def _is_lazy(text: str, start: int, indent: int, lines: Iterator[int]) -> bool:
    """Whether an indented line of Python stands in a function or below `if TYPE_CHECKING`; true
    when the `lines` that may still be looked at run out."""
    end = start
    for _ in lines:
        if indent == 0 or end <= 0:
            return False
        begin = _line_start(text, end - 1)
        if begin is None:
            return True
        line = text[begin:end]
        content = line.lstrip()
        if content.strip():
            width = len(line) - len(content)
            if width < indent:
                if _LAZY_BLOCK.match(content):
                    return True
                indent = width
        end = begin
    return True


def _names(clause: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and what they are called here, of "(a, b as c)"."""
    names, aliases = [], []
    for part in clause.strip("() \t\n").split(","):
        words = part.split()
        if words:
            names.append(words[0])
            aliases.append(words[2] if len(words) >= 3 and words[1] == "as" else words[0])
    return tuple(names), tuple(aliases)


def _python(text: str) -> Iterator[Import]:
    blank = lexing.blank(text, lexing.scan(text, "python"), keep_quotes=True)
    blank = blank.replace("\\\n", "  ")
    look_back = iter(range(_LOOK_BACK))
    for match in _PYTHON.finditer(blank):
        line = _line_start(blank, match.start())
        if line is None:
            continue
        statement = blank[line : match.start()].rpartition(";")[2]
        before = _BEFORE.fullmatch(statement)
        if before is None:
            continue
        before_it = blank[line : match.start()]
        indent = len(before_it) - len(before_it.lstrip(" \t"))
        lazy = bool(indent) and _is_lazy(blank, line, indent, look_back)
        names, aliases = _names(match[1])
        if before[2] is not None:
            if names and before[2].strip():
                yield Import(before[2].replace(" ", ""), names, lazy, "from", aliases)
            continue
        for module, alias in zip(names, aliases, strict=True):
            yield Import(module, (), lazy, "import", (alias,))
    for match in _IMPORT_MODULE.finditer(blank):
        if target := _quoted(text, blank, match.end() - 1):
            yield Import(target, (), True, "import", (target,))


def _quoted(text: str, blank: str, quote: int) -> str:
    """The inside of the string whose opening quote is at `quote`; "" when it does not end there."""
    end = blank.find(blank[quote], quote + 1, quote + 1000)
    inside = text[quote + 1 : end] if end > 0 else ""
    return "" if "\n" in inside else inside


# --- C, C++, Objective-C: kind "quoted" or "angle" ---

_C = re.compile(r"#[ \t]*(?:include(?:_next)?|import)[ \t]*(?:(\")|<([^>\n\"]{1,300})>)")


def _starts_line(text: str, position: int) -> bool:
    begin = _line_start(text, position)
    return begin == position or (begin is not None and text[begin:position].isspace())


def _c(text: str) -> Iterator[Import]:
    blank = lexing.blank(text, lexing.scan(text, "c++"), keep_quotes=True)
    for match in _C.finditer(blank):
        if not _starts_line(blank, match.start()):
            continue
        if match[2]:
            yield Import(match[2].strip(), kind="angle")
        elif target := _quoted(text, blank, match.end() - 1):
            yield Import(target, kind="quoted")


# --- Java: kind "static" for members ---

_JAVA = re.compile(
    r"import[ \t]+(static[ \t]+)?([\w$]+(?:[ \t]*\.[ \t]*[\w$]+)*)([ \t]*\.[ \t]*\*)?[ \t]*;"
)


def _java(text: str) -> Iterator[Import]:
    blank = lexing.blank(text, lexing.scan(text, "java"))
    for match in _JAVA.finditer(blank):
        if not _starts_line(blank, match.start()):
            continue
        target = re.sub(r"[ \t]", "", match[2] + (".*" if match[3] else ""))
        yield Import(target, kind="static" if match[1] else "")


# --- JavaScript and TypeScript: kind "import", "export", "require", "reference" ---

_STATEMENT = re.compile(r"(?:im|ex)port\b")
_CALL = re.compile(r"(?:require|import)[ \t]*\([ \t\n]*([\"'`])")
_STATEMENT_END = re.compile(r"[\"'`;(=]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_TYPE = re.compile(r"type[ \t\n]+(?=[\w$*{])(?!from\b)")
_REFERENCE = re.compile(r"^///[ \t]*<reference[ \t]+path=[\"']([^\"'\n]+)[\"']", re.MULTILINE)


def _javascript(text: str) -> Iterator[Import]:
    blank = lexing.blank(text, lexing.scan(text, "typescript"), keep_quotes=True)
    found = [*_statements(text, blank), *_calls(text, blank)]
    for _, item in sorted(found, key=lambda pair: pair[0]):
        yield item
    for match in _REFERENCE.finditer(text, 0, 5000):
        yield Import(match[1], kind="reference")


def _is_word(blank: str, start: int) -> bool:
    """Whether a word begins at `start`: it is no member and no end of another."""
    before = blank[start - 1] if start else " "
    return not (before.isalnum() or before in "_$.")


def _statements(text: str, blank: str) -> Iterator[tuple[int, Import]]:
    """`import ... from "x"`, `export ... from "x"`, `import "x"`."""
    starts = [match.start() for match in _STATEMENT.finditer(blank)]
    for start, following in itertools.pairwise([*starts, len(blank)]):
        end = _STATEMENT_END.search(blank, start, following)
        if end is None or end[0] not in "\"'`" or not _is_word(blank, start):
            continue
        quote = end.start()
        kind = blank[start : start + 6]
        clause = blank[start + 6 : quote].strip()
        lazy = bool(match := _TYPE.match(clause))
        clause = clause[match.end() :] if match else clause
        if clause.endswith("from"):
            clause = clause.removesuffix("from")
        elif clause or kind == "export":
            continue
        target = _quoted(text, blank, quote)
        if target and (kind == "import" or clause[:1] in ("*", "{")):
            inner = _BRACES.search(clause)
            listed = re.sub(r"\btype[ \t\n]+(?=[\w$])", "", inner[1]) if inner else ""
            names, aliases = _names(listed)
            if "*" in clause:
                names, aliases = (*names, "*"), (*aliases, "*")
            yield start, Import(target, names, lazy, kind, aliases)


def _calls(text: str, blank: str) -> Iterator[tuple[int, Import]]:
    """`require("x")`, `import("x")`."""
    for match in _CALL.finditer(blank):
        if _is_word(blank, match.start()) and (target := _quoted(text, blank, match.start(1))):
            line = _line_start(blank, match.start())
            lazy = match[0][0] == "i" or (line is not None and blank[line].isspace())
            yield match.start(), Import(target, (), lazy, "require")


# --- Go: aliases hold the name of the package here ---

_GO = re.compile(r"import[ \t]*(?:\((?P<block>[^()]*+)\)|(?P<alias>[\w.]+[ \t]+)?(?P<quote>[\"`]))")
_GO_SPEC = re.compile(r"([\w.]+[ \t]+)?([\"`])")


def _go(text: str) -> Iterator[Import]:
    blank = lexing.blank(text, lexing.scan(text, "go"), keep_quotes=True)
    for match in _GO.finditer(blank):
        if match.start() and blank[match.start() - 1] != "\n":
            continue
        if match["block"] is None:
            specs = [(match["alias"], match.start("quote"))]
        else:
            specs = []
            position = match.start("block")
            while spec := _GO_SPEC.search(blank, position, match.end("block")):
                specs.append((spec[1], spec.start(2)))
                close = blank.find(spec[2], spec.end(), match.end("block"))
                position = close + 1 if close > 0 else match.end("block")
        for alias, quote in specs:
            if target := _quoted(text, blank, quote):
                name = (alias or "").strip() or re.sub(r"/v\d+$", "", target).rsplit("/", 1)[-1]
                yield Import(target, aliases=(name,))


# --- Rust: kind "mod", "path" (mod with a path), "use", "pub use", "crate", "include" ---

_RUST = re.compile(
    r"\n(?P<indent>[ \t]*+)(?P<pub>pub(?:\([^)\n]*\))?[ \t]+)?"
    r"(?:mod[ \t]+(?:r#)?(?P<mod>\w+)[ \t]*;"
    r"|(?P<use>use)[ \t\n]+|extern[ \t]+crate[ \t]+(?P<crate>\w+))"
)
_RUST_INLINE = re.compile(r"crate(?:::\w+)+"), re.compile(r"super(?:::\w+)+")
_RUST_PATH = re.compile(
    r"#\[path[ \t]*=[ \t]*\"([^\"\n]+)\"\]\s*(?:#\[[^\]\n]{0,300}\]\s*){0,5}"
    r"(?:pub(?:\([^)]*\))?\s+)?mod\s+(\w+)\s*;"
)
_RUST_INCLUDE = re.compile(r"include!\(\s*(\")")
_MAX_USES = 2000  # names in one `use`, and characters of it: more is no hand-written program
_MAX_USE_CHARS = 20_000


def _expand_use(tree: str) -> list[tuple[str, str]]:
    """Paths and local names of `a::{b::{self, C as D}, e::*}`."""
    found: list[tuple[str, str]] = []
    stack = [""]
    current = ""
    for token in re.findall(r"[{},]|[^{},]+", tree):
        if token == "{":
            stack.append(stack[-1] + current)
            current = ""
        elif token in (",", "}"):
            if current.strip():
                found.append(_use(stack[-1], current))
            current = ""
            if token == "}" and len(stack) > 1:
                stack.pop()
        else:
            current = re.sub(r"\s+", " ", token).strip()
        if len(found) > _MAX_USES:
            return found
    if current.strip():
        found.append(_use(stack[-1], current))
    return found


def _use(prefix: str, item: str) -> tuple[str, str]:
    path, _, alias = (prefix + item).partition(" as ")
    path = path.replace(" ", "").removeprefix("::")
    if path.endswith("::self"):
        path = path.removesuffix("::self")
    return path, alias.strip() or path.rsplit("::", 1)[-1]


def _rust(text: str) -> Iterator[Import]:
    spans = lexing.scan(text, "rust")
    blank = lexing.blank(text, spans, keep_quotes=True)
    comments = lexing.blank(text, [span for span in spans if span.kind == lexing.COMMENT])
    paths = {match[2]: match[1] for match in _RUST_PATH.finditer(comments)}
    taken = []
    matches = list(_RUST.finditer(f"\n{blank}"))  # so positions are one too high
    for match, following in itertools.zip_longest(matches, matches[1:]):
        inner = bool(match["indent"])
        if match["mod"]:
            if inner:
                continue  # a module in a module: its folder is not told by the file alone
            name = match["mod"]
            yield (
                Import(paths[name], (), kind="path") if name in paths else Import(name, kind="mod")
            )
        elif match["crate"]:
            yield Import(match["crate"], kind="crate")
        else:
            begin = match.end() - 1
            end = blank.find(";", begin, begin + _MAX_USE_CHARS)
            if end < 0 or (following and following.start() - 1 < end):
                continue
            taken.append((begin, end))
            for path, alias in _expand_use(blank[begin:end]):
                if inner and path.startswith("super::"):
                    path = path.removeprefix("super::")  # of a module inside this file
                    if not path.startswith("super::"):
                        continue
                kind = "pub use" if match["pub"] else "use"
                yield Import(path, lazy=inner, kind=kind, aliases=(alias,))
    seen = set()
    for expression in _RUST_INLINE:
        for match in expression.finditer(blank):
            before = blank[match.start() - 1] if match.start() else " "
            if match[0] in seen or before.isalnum() or before in "_:$":
                continue
            place = bisect.bisect_right(taken, (match.start(), len(blank))) - 1
            if place < 0 or match.start() >= taken[place][1]:
                seen.add(match[0])
                yield Import(match[0], lazy=True, kind="use")
    for match in _RUST_INCLUDE.finditer(blank):
        if target := _quoted(text, blank, match.start(1)):
            yield Import(target, kind="include")


_READERS: dict[str, Callable[[str], Iterator[Import]]] = {
    "python": _python, "cython": _python,
    "c": _c, "c++": _c, "cuda": _c, "objective-c": _c, "objective-c++": _c, "opencl": _c,
    "java": _java,
    "javascript": _javascript, "typescript": _javascript, "vue": _javascript,
    "svelte": _javascript,
    "go": _go,
    "rust": _rust,
}  # fmt: skip
LANGUAGES = frozenset(_READERS)


def imports(text: str, lang: str) -> list[Import]:
    """In the order of the text; none for a language that is not read."""
    reader = _READERS.get(lang)
    return list(reader(text)) if reader else []
