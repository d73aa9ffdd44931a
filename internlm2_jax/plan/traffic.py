"""Bytes that compiled HLO moves to and from a chip's main memory.

The unit is what runs as one: a fusion reads its operands and writes its results once, whatever
happens inside. Buffers in on-chip memory (S(1) on a TPU) are free. An instruction that touches a
part of a buffer counts the part: the slice of one layer out of stacked parameters, the row that is
written into a cache in place, the rows that a gather picks.
"""

from __future__ import annotations

import re

from internlm2_jax.plan.hlo_text import HBM, Computation, Instruction, Module, Shape, leaves

# Names for something, and ends of transfers that were counted at their start.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "partition-id", "replica-id", "opt-barrier", "optimization-barrier"),
    *("async-update", "add-dependency"),
}
# In a fusion: passed on untouched, or counted with the collective that it belongs to.
_ELSEWHERE = ("tuple", "all-gather", "all-reduce", "all-to-all", "collective-permute")
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "xla.sdy")
# Inside a fusion these pass elements on one by one, so a slice of them is a slice of their input.
_ELEMENTWISE = ("bitcast", "convert", "copy", "reshape", "transpose", "negate")


def hbm_bytes(module: Module, where: Computation, op: Instruction) -> int:
    """Bytes that one instruction reads and writes in main memory."""
    if op.opcode in FREE or op.opcode.endswith("-done"):
        return 0
    if op.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        return _transfer(op)
    if op.opcode == "call":
        inner = module.computations[op.called("to_apply")]
        return sum(hbm_bytes(module, inner, i) for i in inner.instructions)
    if op.opcode == "custom-call" and any(name in op.attributes for name in _FREE_CALLS):
        return 0
    inside = module.computations[op.called()] if op.opcode == "fusion" else None
    total = 0
    for i, name in enumerate(op.operands):
        result = where[name].result
        if inside is not None and isinstance(result, Shape):
            read = _read(module, inside, inside.parameters[i])
        elif i == 0 and op.opcode in ("dynamic-slice", "gather", "slice"):
            read = op.shape.size * result.bytes // max(result.size, 1)  # type: ignore[union-attr]
        elif i == 0 and op.opcode in ("dynamic-update-slice", "scatter"):
            read = 0
        else:
            read = sum(s.bytes for s in leaves(result) if s.space == HBM)
            total += read
            continue
        total += read if isinstance(result, Shape) and result.space == HBM else 0
    total += _written(module, where, op)
    return _estimated(op) or total


def _transfer(op: Instruction) -> int:
    """copy-start gives (destination, source, context), slice-start ((source), destination, ..)."""
    first, second = op.result[:2]  # type: ignore[index]
    parts = (*leaves(first), *leaves(second))
    moved = min(s.bytes for s in parts)
    return sum(moved for s in parts if s.space == HBM)


def _read(module: Module, inside: Computation, value: Instruction) -> int:
    """Bytes that a fusion reads of `value`, one of its parameters or an elementwise form of it."""
    full = value.shape.bytes
    width = full / max(value.shape.size, 1)
    total = 0.0
    for user in inside.instructions:
        for i, name in enumerate(user.operands):
            if name != value.name:
                continue
            if user.opcode in _ELSEWHERE:
                continue
            if user.opcode in _ELEMENTWISE:
                total += _read(module, inside, user) / max(user.shape.bytes, 1) * full
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.shape.size * width if i == 0 else full
            elif user.opcode == "dynamic-update-slice" and i == 0:
                continue
            elif user.opcode == "scatter" and i == 0:
                total += inside[user.operands[-1]].shape.size * width
            elif user.opcode == "fusion":
                deeper = module.computations[user.called()]
                if _passed_on(deeper, i):
                    total += _read(module, inside, user) / max(user.shape.bytes, 1) * full
                else:
                    total += _read(module, deeper, deeper.parameters[i])
            else:
                return full
    return min(full, round(total))


def _passed_on(inside: Computation, i: int) -> bool:
    """Whether a fusion gives its parameter on as its result, in another form at most."""
    value = inside.root
    while value.opcode in _ELEMENTWISE:
        value = inside[value.operands[0]]
    return value.name == inside.parameters[i].name


def _written(module: Module, where: Computation, op: Instruction) -> int:
    """Bytes of the results in main memory; of an update in place, the part that is updated."""
    if isinstance(op.result, tuple):
        inner = module.computations[op.called()].root if op.opcode == "fusion" else None
        if inner is None or inner.opcode != "tuple":
            return sum(s.bytes for s in leaves(op.result) if s.space == HBM)
        computation = module.computations[op.called()]
        pairs = zip(op.result, inner.operands, strict=True)
        return sum(
            _update(module, computation, computation[name])
            for part, name in pairs
            if isinstance(part, Shape) and part.space == HBM
        )
    return _update(module, where, op) if op.result.space == HBM else 0


def _update(module: Module, where: Computation, op: Instruction) -> int:
    if op.opcode == "parameter" or op.opcode in _ELSEWHERE:
        return 0
    if op.opcode == "dynamic-update-slice":
        return where[op.operands[1]].shape.bytes
    if op.opcode == "scatter":
        return where[op.operands[-1]].shape.bytes
    if op.opcode == "fusion" and isinstance(op.result, Shape):
        inner = module.computations[op.called()]
        return _update(module, inner, inner.root)
    if op.opcode in _ELEMENTWISE:
        source = where[op.operands[0]]
        if source.opcode in ("dynamic-update-slice", "scatter", "fusion", *_ELEMENTWISE):
            return _update(module, where, source)
    return sum(s.bytes for s in leaves(op.result))


def _estimated(op: Instruction) -> int:
    """Bytes of a kernel's cost_estimate, 0 without one.

    A kernel may read a block more than once, and of an operand that stays in main memory, such as
    the pages of all layers, only the part that it copies.
    """
    if op.opcode != "custom-call":
        return 0
    pattern = r'"cost_estimate":\s*\{[^}]*?"bytes_accessed":\s*"?(\d+)'
    match = re.search(pattern, op.attributes)
    return int(match.group(1)) if match else 0
