"""Compiled HLO text as computations, instructions and shapes: the grammar, and nothing else.

`compiled.as_text()` is the one description that every XLA back end gives of what it will run, in
the order in which it will run it. An instruction reads

    %name = bf16[2,512]{1,0:T(8,128)(2,1)S(1)} opcode(%operand, ...), attribute=value, ...

where S(n) is the memory space: absent is HBM, 1 a TPU core's vector memory, 5 the host.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

HBM, HOST = 0, 5

_BITS = {
    **{name: 8 * size for name, size in {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "c64": 8}.items()},
    **{f"{kind}{bits}": bits for kind in "suf" for bits in (16, 32, 64)},
    **{"s4": 4, "u4": 4, "s2": 2, "u2": 2, "c128": 128, "f4e2m1fn": 4, "token": 0, "opaque": 0},
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: element type, dimensions, memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements; padding to tiles is not counted."""
        bits = 8 if self.dtype.startswith("f8") else _BITS[self.dtype]
        return (self.size * bits + 7) // 8


# The result of an instruction: an array, or a tuple of results.
Result = Shape | tuple["Result", ...]


def leaves(result: Result) -> Iterator[Shape]:
    """The arrays of a result, in order."""
    if isinstance(result, Shape):
        yield result
    else:
        for part in result:
            yield from leaves(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `arguments` is the text between the parentheses, `attributes` what follows them."""

    name: str
    result: Result
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The text of `name=value`, for values without spaces outside brackets."""
        match = re.search(rf"(?<![\w\"]){name}=", self.attributes)
        if match is None:
            return None
        return self.attributes[match.end() : _end_of_value(self.attributes, match.end())]

    def called(self, name: str = "calls") -> str:
        """Name of the computation under the attribute `name`."""
        value = self.attribute(name)
        if value is None:
            raise ValueError(f"{self.opcode} {self.name} calls nothing under {name!r}")
        return value.lstrip("%")

    @property
    def shape(self) -> Shape:
        """The result, which must be one array."""
        if not isinstance(self.result, Shape):
            raise ValueError(f"{self.opcode} {self.name} gives a tuple, an array was expected")
        return self.result


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of execution (compiled modules are scheduled)."""

    name: str
    instructions: tuple[Instruction, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {i.name: i for i in self.instructions})

    def __getitem__(self, name: str) -> Instruction:
        return self._by_name[name]  # type: ignore[attr-defined]

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions) if i.root)

    @property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))


@dataclasses.dataclass(frozen=True)
class Module:
    """All computations of a program by name, and which of them is the entry."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`. Errors: ValueError on a line that is not HLO."""
    computations: dict[str, Computation] = {}
    entry, name, body = "", "", []
    for line in text.splitlines():
        stripped = line.strip()
        if line.startswith((" ", "\t")) and " = " in line:
            body.append(_instruction(stripped))
        elif line.startswith("}"):  # may be followed by the thread it runs on
            computations[name] = Computation(name, tuple(body))
        elif stripped.endswith("{") and line.startswith(("%", "ENTRY")):
            name = re.match(r"(?:ENTRY )?%?([^\s(]+)", stripped).group(1)  # type: ignore[union-attr]
            entry, body = (name if line.startswith("ENTRY") else entry), []
    if not entry:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text()")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _end_of_value(rest, 0)
    result, rest = parse_result(rest[:end]), rest[end:].lstrip()
    opcode, _, tail = rest.partition("(")
    close = _matching(tail)
    arguments = tail[:close]
    operands = () if opcode in ("constant", "parameter") else _names(arguments)
    attributes = tail[close + 1 :].lstrip(", ")
    return Instruction(name.lstrip("%"), result, opcode, operands, arguments, attributes, root)


def _names(arguments: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%([\w.\-]+)", arguments))


def parse_result(text: str) -> Result:
    """`bf16[2,3]{1,0}` or `(f32[2], (s32[], pred[4]))`."""
    text = re.sub(r"/\*.*?\*/", "", text).strip()
    if text.startswith("("):
        return tuple(parse_result(part) for part in _split(text[1:-1]))
    match = re.match(r"(\w+)\[([^\]]*)\](.*)", text)
    if match is None:
        return Shape("token", ()) if text.startswith("token") else _bad(text)
    dtype, dims, layout = match.groups()
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    return Shape(dtype, sizes, int(space.group(1)) if space else HBM)


def _bad(text: str) -> Shape:
    raise ValueError(f"not an HLO shape: {text[:80]!r}")


# Strings, brackets and what separates values: all that the scanners below stop at.
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{}, ]')


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, start = [], 0, 0
    for mark in _MARKS.finditer(text):
        c = mark.group()
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(text[start : mark.start()])
            start = mark.end()
    last = text[start:]
    return [*parts, last] if last.strip() else parts


def _matching(text: str) -> int:
    """Index of the parenthesis that closes one opened before `text`."""
    depth = 1
    for mark in _MARKS.finditer(text):
        c = mark.group()
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return mark.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _end_of_value(text: str, start: int) -> int:
    """End of a value: the first space or comma outside brackets and quotes."""
    depth = 0
    for mark in _MARKS.finditer(text, start):
        c = mark.group()
        if depth == 0 and c in ", ":
            return mark.start()
        depth += (c in "([{") - (c in ")]}")
    return len(text)
