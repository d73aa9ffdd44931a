"""What the backward pass finds saved, and what it computes again, by name.

Blocks are applied by a scan; a policy says which values of a block are kept for its gradient. Per
token and layer, in entries of the compute dtype (D model, N + 2K heads of H, F mlp):

    none      every intermediate value
    minimal   outputs of attention and of the products but the last: 2 D + 2 (N + K) H + 2 F
    save_qkv  the block's input and the rotated q, k and v: D + (N + 2K) H
    offload   as save_qkv, in the host's memory instead of the device's
    full      the block's input: D; the whole block is computed twice
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from internlm2_jax.errors import UserError

Remat = Literal["none", "minimal", "save_qkv", "offload", "full"]

_QKV = ("q", "k", "v")
_ATTENTION = ("attention_out", "attention_lse")  # of the flash kernel; others have none
_policies = jax.checkpoint_policies


def repeats_mlp(name: Remat) -> bool:
    """Whether the backward pass computes the MLP again, so that it may do so part by part."""
    return name in ("save_qkv", "offload", "full")


def remat(body: Callable[..., Any], name: Remat) -> Callable[..., Any]:
    """`body` of a scan over blocks, keeping for its gradient what the policy `name` says.

    Errors: UserError for an unknown name.
    """
    if name == "none":
        return body
    if name not in get_args(Remat):
        raise UserError(f"no remat policy {name!r}; there are {', '.join(get_args(Remat))}")
    policy = {
        "minimal": _policies.save_only_these_names(*_QKV, *_ATTENTION, "o", "gate", "up"),
        "save_qkv": _policies.save_only_these_names(*_QKV),
        "offload": _policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block_input", *_QKV],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "full": None,
    }[name]
    # A scan already keeps the two passes apart, so no barrier against CSE is needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
