"""How often a while loop of a compiled module runs.

Some back ends write `known_trip_count`; libtpu does not. Then the few scalar instructions of the
loop that decide when it ends are evaluated: the counter's start in the caller, its step in the
body, the comparison in the condition. A loop that ends on data (sampling until all rows have
stopped) has no trip count.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from internlm2_jax.plan.hlo_text import Computation, Instruction, Module

LIMIT = 1_000_000
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier")


class _Unknown(Exception):
    """The value depends on data."""


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Times the body of `loop`, an instruction of `caller`, runs; None when data decide."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called("condition")]
    body = module.computations[loop.called("body")]
    values: dict[int, Any] = {}

    def start(index: int) -> Any:
        return _value(module, caller, _element(caller, loop.operands[0], index), {})

    def state(index: int) -> Any:
        if index not in values:
            values[index] = start(index)
        return values[index]

    try:
        for count in range(LIMIT):
            if not _value(module, condition, condition.root.name, {0: state}):
                return count
            read = dict(values)
            for index in read:
                name = _element(body, body.root.name, index)
                values[index] = _value(module, body, name, {0: state})
    except _Unknown:
        return None
    return None


def _element(computation: Computation, name: str, index: int) -> str:
    """Name of element `index` of the tuple `name`."""
    instruction = computation[name]
    while instruction.opcode in _SAME:
        instruction = computation[instruction.operands[0]]
    if instruction.opcode != "tuple":
        raise _Unknown
    return instruction.operands[index]


def _value(module: Module, where: Computation, name: str, parameters: dict[int, Any]) -> Any:
    """The scalar `name`; a parameter is a value, or a function from tuple index to value."""
    op = where[name]

    def operand(i: int) -> Any:
        return _value(module, where, op.operands[i], parameters)

    if op.opcode == "constant":
        text = op.arguments.strip()
        if re.fullmatch(r"-?\d+", text):
            return int(text)
        if text in ("true", "false"):
            return text == "true"
    elif op.opcode == "parameter":
        value = parameters.get(int(op.arguments))
        if value is not None:
            return value
    elif op.opcode == "get-tuple-element":
        index = int(op.attribute("index") or 0)
        source = where[op.operands[0]]
        if source.opcode == "parameter":
            get = parameters.get(int(source.arguments))
            if callable(get):
                return get(index)
        elif source.opcode in ("tuple", *_SAME):
            return _value(module, where, _element(where, source.name, index), parameters)
        elif source.opcode == "fusion":
            inner = module.computations[source.called()]
            return _call(module, where, source, inner, parameters, inner.root.operands[index])
    elif op.opcode in _SAME:
        return operand(0)
    elif op.opcode == "not":
        return not operand(0)
    elif op.opcode == "compare":
        return _COMPARE[op.attribute("direction") or ""](operand(0), operand(1))
    elif op.opcode == "select":
        return operand(1) if operand(0) else operand(2)
    elif op.opcode in _BINARY:
        return _BINARY[op.opcode](operand(0), operand(1))
    elif op.opcode in ("fusion", "call"):
        inner = module.computations[op.called("calls" if op.opcode == "fusion" else "to_apply")]
        return _call(module, where, op, inner, parameters, inner.root.name)
    raise _Unknown


def _call(
    module: Module,
    where: Computation,
    op: Instruction,
    inner: Computation,
    parameters: dict[int, Any],
    result: str,
) -> Any:
    """`result` of `inner`, the computation that `op` calls with its operands."""

    class Lazy(dict):
        def get(self, key: int, default: Any = None) -> Any:
            return _value(module, where, op.operands[key], parameters)

    return _value(module, inner, result, Lazy())
