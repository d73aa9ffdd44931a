"""Floating-point operations of matrix products in compiled HLO.

A TPU has no dot instruction: libtpu turns every matrix product into a convolution, whose batch
dimensions may become dilated or padded windows. Only the products with a real element count, so
positions that fall on padding or between dilated elements are left out.
"""

from __future__ import annotations

import json
import math
import re

import numpy as np

from internlm2_jax.plan.hlo_text import Computation, Instruction, Module, Shape, leaves

PRODUCTS = ("dot", "convolution", "custom-call")


def flops_of(module: Module, where: Computation, op: Instruction) -> float:
    """Operations (a multiplication and an addition are two) of one instruction.

    Fusions and calls count what is inside them; loops are the caller's business. A Pallas kernel
    counts what its `cost_estimate` says, 0 without one (see `unknown_kernel`).
    """
    if op.opcode == "dot":
        return _dot(where, op)
    if op.opcode == "convolution":
        return _convolution(where, op)
    if op.opcode == "custom-call":
        return _custom_call(where, op)
    if op.opcode in ("fusion", "call", "async-start"):
        inner = module.computations[op.called("to_apply" if op.opcode == "call" else "calls")]
        return sum(flops_of(module, inner, i) for i in inner.instructions)
    return 0.0


def unknown_kernel(op: Instruction) -> bool:
    """A kernel of ours or of a library whose operations the text does not tell."""
    kernel = re.search(r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*)"', op.attributes)
    return bool(kernel) and _estimate(op) is None


def _shape(where: Computation, name: str) -> Shape:
    return where[name].shape


def _dot(where: Computation, op: Instruction) -> float:
    lhs = _shape(where, op.operands[0])
    contracted = [int(d) for d in re.findall(r"\d+", op.attribute("lhs_contracting_dims") or "")]
    return 2.0 * op.shape.size * math.prod(lhs.dims[d] for d in contracted)


def _convolution(where: Computation, op: Instruction) -> float:
    lhs, rhs = (_shape(where, name) for name in op.operands[:2])
    labels = op.attribute("dim_labels") or ""
    left, right, out = re.match(r"(\w+)_(\w+)->(\w+)", labels).groups()  # type: ignore[union-attr]
    spatial = sorted(c for c in out if c.isdigit())
    window = _window(op.attribute("window") or "", len(spatial))
    pairs = 1
    for i, c in enumerate(spatial):
        pairs *= _valid_pairs(
            size=lhs.dims[left.index(c)],
            out=op.shape.dims[out.index(c)],
            **{key: values[i] for key, values in window.items()},
        )
    rows, columns = op.shape.dims[out.index("b")], op.shape.dims[out.index("f")]
    return 2.0 * rows * columns * rhs.dims[right.index("i")] * pairs


def _window(text: str, rank: int) -> dict[str, list[int]]:
    """The fields of window={size=1x4 stride=1x1 pad=0_0x3_3 lhs_dilate=.. rhs_dilate=..}."""
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", text))

    def numbers(name: str, default: int) -> list[int]:
        return [int(n.split("_")[0]) for n in fields[name].split("x")] if name in fields else (
            [default] * rank
        )  # fmt: skip

    return {
        "window": numbers("size", 1),
        "stride": numbers("stride", 1),
        "low": numbers("pad", 0),
        "spread": numbers("lhs_dilate", 1),
        "step": numbers("rhs_dilate", 1),
    }


def _valid_pairs(
    size: int, out: int, window: int, stride: int, low: int, spread: int, step: int
) -> int:
    """(output, window) positions that meet an element, not padding or a gap, in one dimension."""
    positions = np.arange(out, dtype=np.int64) * stride - low
    count = 0
    for k in range(window):
        at = positions + k * step
        count += int(((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum())
    return count


def _custom_call(where: Computation, op: Instruction) -> float:
    target = op.attribute("custom_call_target") or ""
    estimate = _estimate(op)
    if estimate is not None:
        return estimate
    if target.startswith('"__cublas$'):
        return _cublas(where, op)
    if target.startswith('"__cudnn$fmha'):
        return _cudnn_attention(where, op, backward="Backward" in target)
    return 0.0


def _estimate(op: Instruction) -> float | None:
    """FLOPs of a Pallas kernel's cost_estimate."""
    match = re.search(r'"cost_estimate":\s*\{[^}]*?"flops":\s*"?(\d+)', op.attributes)
    return float(match.group(1)) if match else None


def _cublas(where: Computation, op: Instruction) -> float:
    numbers = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', op.attributes)
    if numbers is None:
        raise ValueError(f"{op.name}: a cuBLAS call without dot_dimension_numbers")
    lhs = _shape(where, op.operands[0])
    contracted = math.prod(lhs.dims[int(d)] for d in json.loads(numbers.group(1)))
    return 2.0 * next(leaves(op.result)).size * contracted


def _cudnn_attention(where: Computation, op: Instruction, backward: bool) -> float:
    """Q against K, [B, S, K, H] or [B, K, S, H], rows longer than there are heads.

    Two products forward, five backward (one of them the scores again).
    """
    q, k = (_shape(where, name) for name in op.operands[:2])
    length = max(k.dims[1:3])
    causal = 2.0 if "CAUSAL" in op.attributes else 1.0
    return (5.0 if backward else 2.0) * 2.0 * q.size * length / causal
