"""The programming language of a file: by name, extension, first line, and for the extensions that
several languages share by what the text looks like. Documentation has no programming language.

Which extensions are ambiguous, and between what, follows GitHub's linguist; the expressions that
tell them apart are ours.
"""

from __future__ import annotations

import os
import re

# Extension -> language. For an ambiguous one, the most frequent reading stands here.
EXTENSIONS = {
    ".adb": "ada", ".ads": "ada", ".as": "actionscript", ".asm": "assembly", ".awk": "awk",
    ".bas": "basic", ".bash": "shell", ".bat": "batch", ".bzl": "starlark", ".c": "c",
    ".cc": "c++", ".cfg": "ini", ".cjs": "javascript", ".cl": "opencl", ".clj": "clojure",
    ".cljs": "clojure", ".cls": "tex", ".cmake": "cmake", ".cmd": "batch", ".cob": "cobol",
    ".coffee": "coffeescript", ".cpp": "c++", ".cr": "crystal", ".cs": "c#", ".css": "css",
    ".cts": "typescript", ".cu": "cuda", ".cuh": "cuda", ".cxx": "c++", ".d": "d",
    ".dart": "dart", ".el": "lisp", ".elm": "elm", ".erl": "erlang", ".ex": "elixir",
    ".exs": "elixir", ".f": "fortran", ".f03": "fortran", ".f08": "fortran", ".f77": "fortran",
    ".f90": "fortran", ".f95": "fortran", ".for": "fortran", ".frag": "glsl", ".fs": "f#",
    ".fsx": "f#", ".glsl": "glsl", ".go": "go", ".gradle": "groovy", ".graphql": "graphql",
    ".groovy": "groovy", ".h": "c", ".hcl": "hcl", ".hh": "c++", ".hlsl": "hlsl",
    ".hpp": "c++", ".hrl": "erlang", ".hs": "haskell", ".htm": "html", ".html": "html",
    ".hxx": "c++", ".ini": "ini", ".inl": "c++", ".ipp": "c++", ".ipynb": "notebook",
    ".java": "java", ".jl": "julia", ".js": "javascript", ".json": "json", ".jsx": "javascript",
    ".kt": "kotlin", ".kts": "kotlin", ".l": "lex", ".lean": "lean", ".less": "less",
    ".lhs": "haskell", ".lisp": "lisp", ".ll": "llvm", ".lua": "lua", ".m": "matlab",
    ".metal": "metal", ".mjs": "javascript", ".mk": "make", ".ml": "ocaml", ".mli": "ocaml",
    ".mm": "objective-c++", ".mts": "typescript", ".nim": "nim", ".nix": "nix", ".pas": "pascal",
    ".php": "php", ".pl": "perl", ".pm": "perl", ".pp": "puppet", ".pro": "prolog",
    ".proto": "protobuf", ".ps1": "powershell", ".psm1": "powershell", ".pxd": "cython",
    ".py": "python", ".pyi": "python", ".pyw": "python", ".pyx": "cython", ".r": "r",
    ".rake": "ruby", ".rb": "ruby", ".rkt": "racket", ".rs": "rust", ".s": "assembly",
    ".sass": "sass", ".scala": "scala", ".scm": "scheme", ".scss": "scss", ".sh": "shell",
    ".sol": "solidity", ".sql": "sql", ".ss": "scheme", ".sty": "tex", ".sv": "systemverilog",
    ".svelte": "svelte", ".svh": "systemverilog", ".swift": "swift", ".t": "perl", ".tcl": "tcl",
    ".tex": "tex", ".tf": "hcl", ".thrift": "thrift", ".toml": "toml", ".ts": "typescript",
    ".tsx": "typescript", ".v": "verilog", ".vb": "visual basic", ".vert": "glsl",
    ".vhd": "vhdl", ".vhdl": "vhdl", ".vim": "vim", ".vue": "vue", ".wat": "webassembly",
    ".wgsl": "wgsl", ".xml": "xml", ".xsl": "xml", ".y": "yacc", ".yaml": "yaml", ".yml": "yaml",
    ".zig": "zig", ".zsh": "shell",
}  # fmt: skip
FILE_NAMES = {
    ".bashrc": "shell", ".clang-format": "yaml", ".profile": "shell", ".zshrc": "shell",
    "build": "starlark", "build.bazel": "starlark", "cargo.lock": "toml", "cmakelists.txt": "cmake",
    "containerfile": "docker", "dockerfile": "docker", "gemfile": "ruby", "gnumakefile": "make",
    "go.mod": "go module", "jenkinsfile": "groovy", "justfile": "make", "makefile": "make",
    "makefile.am": "make", "makefile.in": "make", "meson.build": "meson",
    "meson_options.txt": "meson", "pipfile": "toml", "pkgbuild": "shell", "rakefile": "ruby",
    "requirements.txt": "requirements", "sconscript": "python", "sconstruct": "python",
    "vagrantfile": "ruby", "wscript": "python",
}  # fmt: skip
_INTERPRETERS = {
    "ash": "shell", "awk": "awk", "bash": "shell", "bun": "typescript", "dash": "shell",
    "deno": "typescript", "escript": "erlang", "gawk": "awk", "groovy": "groovy",
    "guile": "scheme", "julia": "julia", "ksh": "shell", "lua": "lua", "make": "make",
    "node": "javascript", "nodejs": "javascript", "ocaml": "ocaml", "perl": "perl", "php": "php",
    "pwsh": "powershell", "pypy": "python", "python": "python", "racket": "racket",
    "rscript": "r", "ruby": "ruby", "runhaskell": "haskell", "sh": "shell", "swipl": "prolog",
    "tclsh": "tcl", "wish": "tcl", "zsh": "shell",
}  # fmt: skip
# Languages of settings and data rather than programs: no functions, no imports.
DATA_LANGUAGES = frozenset(
    {"json", "xml", "yaml", "toml", "ini", "html", "css", "notebook", "requirements", "go module"}
)

_HEURISTIC_CHARS = 50_000
_OBJECTIVE_C = (
    r"^\s*@(?:interface|implementation|protocol|property|end|class|import|synthesize)\b"
    r"|^\s*#\s*import\s+[<\"]|\[\s*\w+\s+\w+(?:\]|:)|NSString|@autoreleasepool"
)
_CPP = (
    r"^\s*(?:class\s+(?:\w+\s+)?\w+\s*(?:[;:{]|final\b|$)|template\s*<|namespace\b[^;=]*\{?$|using\s+(?:namespace\s+)?\w+"
    r"|(?:public|private|protected)\s*:|constexpr\b|explicit\s+\w+\(|virtual\s)"
    r"|\b(?:std|boost|absl)::\w|\bstatic_cast<|\bnullptr\b|\bnoexcept\b|\w+::~?\w+\s*\("
    r"|^\s*#\s*include\s*<(?:string|vector|map|memory|iostream|utility|algorithm|functional"
    r"|cstd\w+"
    r"|array|set|optional|tuple|type_traits|unordered_\w+|c(?:math|string|errno|time|assert))>"
)
_PROLOG = r"^\s*:-\s|^[a-z]\w*(?:\([^()]*\))?\s*(?::-|\.\s*$)"
# Extension -> (language, expression) in order of trial; the language of EXTENSIONS when none fits.
# `^` and `$` are those of lines; comments are removed from C before.
_AMBIGUOUS: dict[str, tuple[tuple[str, str], ...]] = {
    ".h": (
        (
            "objective-c",
            r"^\s*@(?:interface|protocol|property|end|class|import)\b|^\s*#\s*import\b",
        ),
        ("c++", _CPP),
    ),
    ".m": (
        ("objective-c", _OBJECTIVE_C + r"|^\s*#\s*(?:include|define|if)\b|^\s*//"),
        ("mercury", r"^:-\s*(?:module|interface|import_module)\b"),
        ("mathematica", r"\(\*|^\s*BeginPackage\[|:=\s*(?:Module|Block|With)\["),
    ),
    ".pl": (
        (
            "perl",
            r"^\s*(?:use\s+(?:strict|warnings|v?5)|my\s+[$@%]|sub\s+\w+|package\s+\w)"
            r"|[$@]\w+\s*=[~\s]",
        ),
        ("prolog", _PROLOG),
    ),
    ".pro": (
        ("qmake", r"^\s*(?:TEMPLATE|TARGET|QT|SOURCES|HEADERS|CONFIG)\s*[+-]?="),
        ("prolog", _PROLOG),
        ("idl", r"^\s*(?:pro|function)\s+\w+\s*(?:,|$)"),
    ),
    ".v": (
        ("vlang", r"^\s*(?:pub\s+)?fn\s+\w+\s*\("),
        (
            "verilog",
            r"^\s*(?:module\s+\w+\s*(?:[(;#]|$)|endmodule\b|`(?:timescale|define|include|ifdef)"
            r"|always\s*@|(?:wire|reg|assign|input|output)\b)",
        ),
        (
            "coq",
            r"^\s*(?:Require\s+(?:Import|Export)|From\s+\w+\s+Require|Theorem|Lemma|Definition"
            r"|Fixpoint|Inductive|Proof|Qed|Module|Section|Notation)\b",
        ),
    ),
    ".ts": (("qt translation", r"\A\s*(?:<\?xml[^>]*>)?\s*(?:<!DOCTYPE TS>|<TS\b)"),),
    ".cls": (
        (
            "visual basic",
            r"^\s*(?:VERSION [\d.]+ CLASS|Attribute VB_|(?:Public |Private )?(?:Sub|Function)\b)",
        ),
        (
            "apex",
            r"^\s*(?:@isTest\b|(?:public|private|global)\s+(?:with(?:out)? sharing\s+)?"
            r"(?:virtual\s+|abstract\s+)?(?:class|interface|enum)\b)",
        ),
        ("tex", r"\\(?:NeedsTeXFormat|ProvidesClass|newcommand|def)\b"),
    ),
    ".d": (
        ("make", r"\A[^\n:=]{1,300}\.l?o\s*:"),
        ("d", r"^\s*(?:module|import)\s+[\w.]+|\b(?:auto|immutable|void|string|unittest)\b"),
    ),
    ".fs": (
        ("glsl", r"^\s*#version\s+\d+|\bgl_\w+|^\s*(?:uniform|varying|precision)\s"),
        ("forth", r"^:\s+\S+\s.*;\s*$|^\s*\\ "),
    ),
    ".pp": (("pascal", r"^\s*(?i:unit|program|uses|interface|begin|end\.)\b"),),
    ".t": (
        ("perl", r"^\s*use\s+\w|^\s*my\s+[$@%]"),
        ("turing", r"^\s*(?:proc|function)\s+\w+.*$|^\s*put\s+\""),
    ),
    ".l": (
        ("lex", r"^%%|^%\{|^%option"),
        ("lisp", r"^\s*\((?:defun|defmacro|de|setq)\b"),
        ("roff", r"^\.(?:SH|TH|PP)\b"),
    ),
    ".as": (
        (
            "actionscript",
            r"^\s*(?:package\b|import\s+[\w.]+;|(?:public|private)\s+(?:class|function|var)\b)",
        ),
        ("angelscript", r"^\s*(?:void|int|class|string)\s+\w+"),
    ),
    ".inc": (
        ("php", r"<\?php"),
        ("c++", _CPP),
        ("c", r"^\s*#\s*(?:include|define|if|ifdef)\b|^\s*/\*"),
        ("pascal", r"^\s*\{\$|^\s*(?i:procedure|begin)\b"),
        ("assembly", r"^\s*(?:\.macro|%define|section|mov|push)\b"),
    ),
}
_COMPILED = {
    extension: tuple((language, re.compile(mark, re.MULTILINE)) for language, mark in rules)
    for extension, rules in _AMBIGUOUS.items()
}
_C_COMMENTS = re.compile(r"/\*.*?(?:\*/|\Z)|//[^\n]*", re.DOTALL)
_SHEBANG = re.compile(r"#!\s*(?:/\S*/)?(?:env\s+(?:-\S+\s+|\w+=\S*\s+)*)?(\S+)")
_MODELINE = re.compile(
    r"-\*-(?:.*?\bmode:)?\s*([A-Za-z+#]+)\s*(?:;.*?)?-\*-"
    r"|\b(?:vim?|ex):.*?\b(?:ft|filetype|syntax)=(\w+)"
)
_MODES = {
    "c": "c", "c++": "c++", "cpp": "c++", "objc": "objective-c", "matlab": "matlab",
    "octave": "matlab", "perl": "perl", "cperl": "perl", "prolog": "prolog", "coq": "coq",
    "verilog": "verilog", "python": "python", "ruby": "ruby", "sh": "shell", "tcl": "tcl",
    "lisp": "lisp", "scheme": "scheme", "emacs-lisp": "lisp", "javascript": "javascript",
    "typescript": "typescript", "php": "php", "asm": "assembly",
}  # fmt: skip

_PROSE = frozenset(
    {".md", ".markdown", ".mkd", ".mdx", ".rst", ".txt", ".adoc", ".asciidoc", ".org", ".pod",
     ".rdoc", ".textile", ".texi", ".texinfo", ""}
)  # fmt: skip
_ALWAYS_PROSE = _PROSE - {".txt", ""}
_PROSE_NAMES = re.compile(
    r"(?:readme|changelog|changes|contributing|code_of_conduct|history|install(?:ation)?|news|notes"
    r"|authors|contributors|maintainers|security|support|todo|faq|usage|tutorial|manual|guide"
    r"|design|architecture|hacking|upgrading|migration|roadmap|release[-_]?notes|overview|thanks)"
    r"(?:[-_.][a-z]{2}(?:[-_][a-z]{2})?)?"
)
_LEGAL = re.compile(r"(?:un)?licen[cs]e|copying|copyright\b")  # told by code.licences
_PROSE_FOLDERS = frozenset(
    {"doc", "docs", "documentation", "guide", "guides", "manual", "tutorial", "tutorials", "wiki"}
)


def split_name(path: str) -> tuple[str, str]:
    """Lower-cased file name without its folders, and its extension with the dot."""
    name = path.rsplit("/", 1)[-1].lower()
    return name, os.path.splitext(name)[1]


def language(path: str, text: str = "") -> str | None:
    """The language's lower-case name, or None for prose and what is unknown. Without `text`, the
    most frequent reading of an ambiguous extension."""
    name, extension = split_name(path)
    if name in FILE_NAMES:
        return FILE_NAMES[name]
    if name.startswith("dockerfile."):
        return "docker"
    if re.fullmatch(r"(?:dev-|test-)?requirements[-\w.]*\.txt", name):
        return "requirements"
    if (
        extension in (".in", ".tmpl", ".tpl", ".template")
        and (inner := split_name(name[: -len(extension)])[1]) in EXTENSIONS
    ):
        extension = inner
    if extension in _COMPILED and text:
        return _by_content(extension, text)
    if extension in EXTENSIONS:
        return EXTENSIONS[extension]
    if not extension or extension in (".cgi", ".fcgi"):
        return _by_first_line(text)
    return None


def _by_content(extension: str, text: str) -> str | None:
    head = text[:_HEURISTIC_CHARS]
    if said := _by_first_line(head):
        return said
    if extension in (".h", ".inc"):
        head = _C_COMMENTS.sub(" ", head)
    for name, mark in _COMPILED[extension]:
        if mark.search(head):
            return name
    return EXTENSIONS.get(extension)


def _by_first_line(text: str) -> str | None:
    """From `#!/usr/bin/env python3` or an editor's mode line among the first two lines."""
    head = text[:400].split("\n", 2)[:2]
    if not head:
        return None
    if head[0].startswith("#!") and (match := _SHEBANG.match(head[0])):
        interpreter = re.sub(r"[\d.]+$", "", match[1].rsplit("/", 1)[-1].lower())
        return _INTERPRETERS.get(interpreter)
    for line in head:
        if match := _MODELINE.search(line):
            return _MODES.get((match[1] or match[2]).lower())
    return None


def is_documentation(path: str) -> bool:
    """Whether a file is prose for people: README, change log, what lies below docs/."""
    name, extension = split_name(path)
    if name in FILE_NAMES or extension not in _PROSE or language(path) or _LEGAL.match(name):
        return False
    if extension in _ALWAYS_PROSE:
        return True
    stem = name.removesuffix(extension)
    if _PROSE_NAMES.fullmatch(stem):
        return True
    folders = path.lower().split("/")[:-1]
    return extension == ".txt" and not _PROSE_FOLDERS.isdisjoint(folders)


_FENCE_TAGS = {
    "assembly": "asm", "c#": "csharp", "c++": "cpp", "cuda": "cuda", "docker": "dockerfile",
    "f#": "fsharp", "go module": "go-module", "make": "makefile", "matlab": "matlab",
    "objective-c": "objectivec", "objective-c++": "objectivec", "shell": "bash",
    "notebook": "json", "requirements": "text", "qt translation": "xml", "visual basic": "vb",
    "und": "", "": "",
}  # fmt: skip


def fence_tag(lang: str) -> str:
    """The language's name after a Markdown fence."""
    return _FENCE_TAGS.get(lang, lang.replace(" ", "-"))
