"""Plain text out of files that wrap it: man pages, package metadata, Python docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import warnings

# Shorter docstrings ("Returns the name.") say little without their code.
_MIN_DOCSTRING_CHARS = 60

_ROFF_ESCAPES = (
    (re.compile(r"\\f(?:\[[^]]*\]|\(..|.)"), ""),  # fonts
    (re.compile(r"\\s[-+]?\d"), ""),  # sizes
    (re.compile(r"\\\*(?:\[[^]]*\]|\(..|.)"), ""),  # strings
    (re.compile(r"\\n(?:\[[^]]*\]|\(..|.)"), ""),  # registers
    (re.compile(r"\\[hvwZX]'[^']*'"), ""),  # motions
    (re.compile(r"\\[&%/,:|^c)!]|\\m\[[^]]*\]"), ""),
)
_ROFF_CHARACTERS = {
    "aq": "'", "cq": "'", "oq": "'", "dq": '"', "lq": '"', "rq": '"', "bu": "*", "em": "--",
    "en": "-", "hy": "-", "mi": "-", "ha": "^", "ti": "~", "rs": "\\", "co": "(c)", "rg": "(R)",
    "tm": "(TM)", "ga": "`", "la": "<", "ra": ">", "mu": "x", "->": "->", "<-": "<-", "pl": "+",
    "fm": "'", "at": "@", "sh": "#", "sl": "/", "ul": "_", "Do": "$", "eq": "=",
}  # fmt: skip
_ROFF_LITERAL = (
    ("\\-", "-"), ("\\ ", " "), ("\\~", " "), ("\\'", "'"), ("\\`", "`"), ("\\0", " "),
    ("\\.", "."), ("\\e", "\\"),
)  # fmt: skip
_ROFF_NAMED = re.compile(r"\\\((..)|\\\[([^]]*)\]")
_FONT_MACROS = {"B", "I", "R", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB", "CW", "C"}
_JOINING = {"BR", "RB", "BI", "IB", "IR", "RI"}  # arguments are set without a space between
_BREAKS = {"PP", "P", "LP", "sp", "HP", "RE", "Pp", "EE", "fi", "IP", "TP", "TQ", "It"}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')


def _roff_text(line: str) -> str:
    if "\\" not in line:
        return line
    for pattern, replacement in _ROFF_ESCAPES:
        line = pattern.sub(replacement, line)
    line = _ROFF_NAMED.sub(lambda m: _ROFF_CHARACTERS.get(m[1] or m[2], ""), line)
    for escape, character in _ROFF_LITERAL:
        line = line.replace(escape, character)
    return line


def man_page(source: str) -> str:
    """The words of a man page in roff (man and simple mdoc macros), paragraphs kept, layout lost.

    Enough for a corpus; tables, equations and conditional parts are dropped.
    """
    out: list[str] = []
    skip_until = ""
    for line in source.split("\n"):
        if skip_until:
            skip_until = "" if line.startswith(skip_until) else skip_until
            continue
        if not line.startswith((".", "'")):
            if line.strip() in ("\\{\\", "\\{", "\\}"):
                continue
            out.append(_roff_text(line) if line.strip() else "")
            continue
        name, _, rest = line[1:].strip().partition(" ")
        if name.startswith(("\\", '"')):
            continue
        rest = rest.partition('\\"')[0].strip()
        if name in ("de", "de1", "am", "ig"):
            skip_until = ".."
        elif name in ("TS", "EQ"):
            skip_until = ".TE" if name == "TS" else ".EN"
        elif name in ("ie", "if", "el", "while"):
            if "\\{" in rest and "\\}" not in rest:
                skip_until = ".\\}" if ".\\}" in source else "'br\\}"
        elif name in ("SH", "SS", "Sh", "Ss"):
            out += ["", _roff_text(rest.strip('"')).strip(), ""]
        else:
            arguments = [m[1].replace('""', '"') if m[1] is not None else m[2]
                         for m in _ARGUMENT.finditer(rest)]  # fmt: skip
            if name in _FONT_MACROS:
                out.append(_roff_text(("" if name in _JOINING else " ").join(arguments)))
            elif name in _BREAKS:
                out.append("")
                if name == "IP" and arguments:
                    out.append(_roff_text(arguments[0]))
            elif name in ("Nm", "Fl", "Ar", "Cm", "Pa", "Xr", "Nd", "Op", "Em", "Sy", "Li", "Ql"):
                mark = "-" if name == "Fl" else ""
                out.append(_roff_text(mark + " ".join(arguments)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def package_description(metadata: str) -> str:
    """The long description of a package's METADATA file: the body after the headers."""
    return metadata.replace("\r\n", "\n").partition("\n\n")[2].strip()


def docstrings(source: str, module: str) -> str:
    """The docstrings of a module, its classes and functions, each under the name it documents.

    Raises SyntaxError (or ValueError) when `source` is not Python of this interpreter's version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        tree = ast.parse(source)
    parts: list[str] = []

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                full = f"{name}.{child.name}" if name else child.name
                add(child, _signature(child, full))
                if isinstance(child, ast.ClassDef):
                    visit(child, full)

    def add(node: ast.AST, title: str) -> None:
        text = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
        if text and len(text := inspect.cleandoc(text)) >= _MIN_DOCSTRING_CHARS:
            parts.append(f"{title}\n\n{text}")

    add(tree, module)
    visit(tree, "")
    return "\n\n\n".join(parts)


def _signature(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = node.args
    names = [a.arg for a in arguments.posonlyargs + arguments.args]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [a.arg for a in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return f"{name}({', '.join(n for n in names if n not in ('self', 'cls'))})"
