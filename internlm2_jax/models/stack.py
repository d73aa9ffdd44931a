"""Applies stacked layers with `jax.lax.scan`: compile time does not grow with depth.

Layers differ in at most their kind (`ModelConfig.attention_pattern`). The scan goes a whole pattern
at a time: its body holds one layer of each place in the pattern, so what a kind decides (a window)
is a constant of that layer's kernel, which can then leave out the blocks that no query sees. The
other way, one body for all layers with the window as a scanned scalar, would make every mask and
every block of the kernel depend on data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

Step = Callable[[Any, Any], Any]


def apply(steps: Sequence[Step], carry: Any, layers: Any) -> Any:
    """The carry after all layers: layer l does carry = steps[l % P](carry, its slice of `layers`).

    Args:
      steps: one function for each of the P places of the pattern.
      layers: tree whose leaves have a leading layer axis, a multiple of P long.
    """
    period = len(steps)

    def body(carry: Any, group: Any) -> tuple[Any, None]:
        for place, step in enumerate(steps):
            layer = group if period == 1 else jax.tree.map(lambda leaf, i=place: leaf[i], group)
            carry = step(carry, layer)
        return carry, None

    if period > 1:
        layers = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), layers)
    return jax.lax.scan(body, carry, layers)[0]
