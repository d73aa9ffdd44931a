"""Instructions taken from the corpus itself: code that documents itself, texts that define things.

InternLM2 is fine-tuned on ten million instruction instances that are not public. What any corpus
does hold is questions with their answers in place: a function and the first sentence of its
docstring, a name and the module that defines it, a term and "X is a ...". These are extracted by
rule, kept short, and de-duplicated. Code is only parsed, never run.

Rows are plain dicts: {"messages": [user, assistant], "source": ..., "family": ...}.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import hashlib
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

# A 4k vocabulary spends a token on about three characters of English and two of code.
MAX_ANSWER_CHARS = 140
MAX_PROMPT_CHARS = 220
MAX_FILE_CHARS = 100_000  # the longest files are mostly tables, and slow to parse
PER_DOCUMENT = 8  # a long file must not crowd out the others
PER_ANSWER = 2  # "Return the value." answers a hundred functions
# No family takes more than this share of the limit. Where a name is defined can only be learnt by
# heart, so a little of that is enough.
MOST = {
    "docstring": 0.45,
    "signature": 0.25,
    "class": 0.2,
    "module": 0.05,
    "definition": 0.2,
    "command": 0.15,
    "title": 0.1,
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One question and answer. `key` names what it is about: the split hashes that, so that all
    questions about one function fall on the same side."""

    prompt: str
    answer: str
    family: str
    source: str
    key: str

    def row(self) -> dict[str, Any]:
        messages = [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.answer},
        ]
        return {"messages": messages, "source": self.source, "family": self.family}


def extract(
    documents: Iterable[tuple[str, str, str]], limit: int
) -> tuple[list[Instruction], dict[str, int]]:
    """Up to `limit` distinct instructions from (source, path, text) documents, in their order.

    Reads documents until twice as many are found, so that families can be evened out. Also
    returns counts: documents read, syntax_errors, and instructions per family. An empty corpus
    gives an empty list.
    """
    counts: collections.Counter[str] = collections.Counter(documents=0, syntax_errors=0)
    found: dict[str, Instruction] = {}
    answers: collections.Counter[str] = collections.Counter()
    modules: dict[str, set[str]] = collections.defaultdict(set)
    for source, path, text in documents:
        counts["documents"] += 1
        candidates: list[Instruction] = []
        for file, code in python_files(path, text):
            try:
                tree = parse(code)
            except SyntaxError:
                counts["syntax_errors"] += 1
                continue
            for item in from_code(source, file, tree):
                if item.family == "module":
                    modules[item.prompt].add(item.answer)
                candidates.append(item)
        if not path.endswith(".py"):
            candidates.extend(from_text(source, path, text))
        candidates.sort(key=lambda item: _hash(item.key + item.family))
        for item in candidates[:PER_DOCUMENT]:
            if item.prompt not in found and answers[item.answer] < PER_ANSWER and _short(item):
                found[item.prompt] = item
                # Many names live in one module: those answers may repeat.
                answers[item.answer] += item.family != "module"
        if len(found) >= 2 * limit:
            break
    kept = [i for i in found.values() if i.family != "module" or len(modules[i.prompt]) == 1]
    kept = _even_out(kept, limit)
    counts.update(item.family for item in kept)
    return kept, dict(counts)


def _even_out(items: list[Instruction], limit: int) -> list[Instruction]:
    """The first `limit` of the items, no family with more than its share MOST."""
    taken: collections.Counter[str] = collections.Counter()
    kept: list[Instruction] = []
    for item in items:
        if taken[item.family] < MOST[item.family] * limit and len(kept) < limit:
            taken[item.family] += 1
            kept.append(item)
    return kept


def _short(item: Instruction) -> bool:
    return len(item.prompt) <= MAX_PROMPT_CHARS and len(item.answer) <= MAX_ANSWER_CHARS


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def _wording(key: str, *wordings: str) -> str:
    return wordings[_hash(key) % len(wordings)]


# ------------------------------------------------------------------------------------------ code

# A fenced Python block; the line before it may name the file, as in a repository laid out as one
# Markdown text (InternLM2 section 3.1.2).
_FENCE = re.compile(r"^([^\n]*)\n+```(?:python|py)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"[\w./-]+\.py\b")


def python_files(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(path, code) of each Python file in a document: the document itself or its fenced blocks."""
    if path.endswith(".py"):
        if len(text) <= MAX_FILE_CHARS:
            yield path, text
        return
    if "```py" not in text:
        return
    for match in _FENCE.finditer("\n" + text):
        name = _FILE_NAME.search(match.group(1))
        yield (name.group(0) if name else ""), match.group(2)


def parse(code: str) -> ast.Module:
    """ast.parse that fails in one way only, SyntaxError, and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(code)
        except (ValueError, RecursionError, MemoryError) as error:  # NUL bytes, monstrous nesting
            raise SyntaxError(str(error)) from error


def module_name(path: str) -> str:
    """Dotted module of a path such as lib/python3.11/site-packages/a/b/__init__.py: "a.b"."""
    path = re.split(r"(?:site|dist)-packages/|lib/python3\.?\d*/|(?:^|/)src/", path)[-1]
    parts = [part for part in path.removesuffix(".py").split("/") if part]
    if parts and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts) if all(part.isidentifier() for part in parts) else ""


def from_code(source: str, path: str, tree: ast.Module) -> Iterator[Instruction]:
    """Questions about the public functions, methods and classes of one parsed file."""
    module = module_name(path)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _about_function(source, module, node, owner="")
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            key = f"{module}.{node.name}"
            if sentence := first_sentence(ast.get_docstring(node, clean=False)):
                ask = _wording(
                    key, "What is the class `{}`?", "Describe the Python class `{}`."
                ).format(node.name)
                yield Instruction(ask, sentence, "class", source, key)
                yield from _about_module(source, module, node.name)
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _about_function(source, module, member, owner=node.name)


def _about_function(
    source: str, module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str
) -> Iterator[Instruction]:
    sentence = first_sentence(ast.get_docstring(node, clean=False))
    if node.name.startswith("_") or not sentence:
        return
    name = f"{owner}.{node.name}" if owner else node.name
    key = f"{module}.{name}"
    arguments = _arguments(node.args, method=bool(owner))
    kind = "method" if owner else "function"
    ask = _wording(
        key,
        "What does the {} `{}({})` do?",
        "Explain the Python {} `{}({})` in one sentence.",
        "Write a docstring for the {} `{}({})`.",
    ).format(kind, name, arguments)
    yield Instruction(ask, sentence, "docstring", source, key)
    if not owner:
        ask = f"Write the signature of a Python function for this: {sentence}"
        yield Instruction(ask, f"def {node.name}({arguments}):", "signature", source, key)
        yield from _about_module(source, module, node.name)


def _about_module(source: str, module: str, name: str) -> Iterator[Instruction]:
    if module and len(name) > 3:
        ask = f"Which module defines `{name}`?"
        yield Instruction(ask, module, "module", source, f"{module}.{name}")


def _arguments(arguments: ast.arguments, method: bool) -> str:
    """Parameter names as in a call: no annotations, no defaults, no self."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if method and names and names[0] in ("self", "cls"):
        names = names[1:]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    names.extend(argument.arg for argument in arguments.kwonlyargs)
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return ", ".join(names)


# ------------------------------------------------------------------------------------------ text

_SENTENCE_END = re.compile(
    r"(?<=[a-z0-9)`\]'\"])(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\betc)[.!?](?=\s|$)"
)
_MARKUP = re.compile(r">>>|::|--|\]\[|:param|https?:|\||\{|\}|\\|__|<|@|=\s*$|:\w+:`")


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring or paragraph as one line, or "" if it is no fit answer.

    Fit: 3 to 30 words of plain ASCII prose within MAX_ANSWER_CHARS that begins with a letter.
    """
    if not text:
        return ""
    paragraph = inspect.cleandoc(text).split("\n\n", 1)[0]
    sentence = " ".join(paragraph.split())
    if end := _SENTENCE_END.search(sentence):
        sentence = sentence[: end.start()]
    sentence = sentence.replace("``", "`").rstrip(".:;,! ") + "."
    fit = (
        len(sentence) <= MAX_ANSWER_CHARS
        and 3 <= len(sentence.split()) <= 30
        and sentence.isascii()
        and sentence[0].isalpha()
        and not _MARKUP.search(sentence)
    )
    return sentence if fit else ""


_DEFINITION = re.compile(
    r"(?:^|\n\n)((?:[A-Z][\w.+-]*)(?: [A-Z][\w.+-]*){0,2}) (is (?:an?|the) [^\n]+(?:\n[^\n]+)*)"
)
_NOT_A_TERM = re.compile(
    r"^(this|it|there|that|these|what|here|which|he|she|if|when|where|each|one|no|note|all|your|our"
    r"|my|the|its|an?|another|in|for|see|some|any|only|because|below|above|q|as|of|how|why|who|with|to)\b",
    re.IGNORECASE,
)
_COMMAND = re.compile(r"\bNAME\s*\n\s*([\w.+-]+)(?:, ?[\w.+-]+)*\s+(?:\\?-|—|–)\s+([^\n]+)")
_TITLE = re.compile(
    r"\A\s*(?:# +([^\n#]{3,50})|([^\n]{3,50})\n[=*#-]{3,})\s*\n\s*\n([^\n].*?)(?:\n\n|\Z)", re.S
)


def from_text(source: str, path: str, text: str) -> Iterator[Instruction]:
    """Definitions, command summaries and titles of one text document."""
    head = text[:20_000]
    if (command := _COMMAND.search(head)) and (what := first_sentence(command.group(2))):
        name = command.group(1)
        ask = _wording(name, "What does the command `{}` do?", "What is `{}` for?").format(name)
        yield Instruction(ask, what, "command", source, f"command {name}")
    if title := _TITLE.match(head):
        name = (title.group(1) or title.group(2)).strip().strip("`*")
        sentence = first_sentence(title.group(3))
        if sentence and name.isascii() and len(name.split()) <= 5 and name[0].isalpha():
            yield Instruction(f"What is {name} about?", sentence, "title", source, f"title {name}")
    for match in _DEFINITION.finditer(head):
        term = match.group(1)
        sentence = first_sentence(f"{term} {match.group(2)}")
        if sentence.startswith(f"{term} is ") and not _NOT_A_TERM.match(term):
            yield Instruction(f"What is {term}?", sentence, "definition", source, f"term {term}")
