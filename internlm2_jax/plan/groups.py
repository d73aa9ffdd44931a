"""Which devices talk to each other in a collective, and along which axes of the mesh.

XLA writes the groups of a collective in four forms:

    {{0,1},{2,3}}                              every group
    [2,4]<=[4,2]T(1,0)                         iota: arange(8).reshape(4,2).transpose(1,0) as 2 x 4
    mesh['a'=4,'b'=2] {'a'}                    one group per position along the other axes
    source_target_pairs={{0,1},{1,2},...}      a permutation

Numbers are positions in `mesh.devices.flat`, the order in which jax assigns devices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from internlm2_jax.plan.hlo_text import Instruction

Groups = np.ndarray  # [groups, members] of device numbers; for a permutation [pairs, 2]


def groups_of(instruction: Instruction, num_devices: int) -> Groups:
    """The groups of a collective. Errors: ValueError on a form that is not known."""
    pairs = _attribute(instruction, "source_target_pairs")
    if pairs:
        return _explicit(pairs)
    text = _attribute(instruction, "replica_groups") or "{}"
    if text.startswith("mesh["):
        return _mesh_form(text)
    if text.startswith("["):
        return _iota(text)
    if text in ("{}", "{{}}"):
        return np.arange(num_devices)[None]
    if text.startswith("{{"):
        return _explicit(text)
    raise ValueError(f"{instruction.name}: replica_groups={text!r} is in a form not known here")


def between_slices(instruction: Instruction, num_devices: int) -> tuple[str, str, Groups] | None:
    """(kind of collective, name, groups) of a transfer to other slices; None for any other.

    Slices follow one another in the mesh (sharding.py: only the first axis crosses them), and equal
    places in them are a group.
    """
    text = instruction.attributes
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)
    if kind is None:
        return None
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', text)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', text)
    if name is None or target is None:
        raise ValueError(f"{instruction.name}: a transfer between slices in a form not known here")
    ranges = [[int(n) for n in part.split(":")] for part in target.group(1).split(",")]
    slices = sum(part[-1] - part[0] + 1 for part in ranges)
    groups = np.arange(num_devices).reshape(slices, -1).T
    return kind.group(1).lower().replace("_", "-"), name.group(1), groups


def axes_of(groups: Groups, mesh_shape: dict[str, int], permutation: bool = False) -> str:
    """Names of the mesh axes along which `groups` run, joined by "+".

    A group along a part of an axis is "fsdp/4" (4 is its size); one that follows no axes is "mixed"
    with its size. A group of one device is "none".
    """
    sizes = tuple(mesh_shape.values())
    places = np.stack(np.unravel_index(groups, sizes), axis=-1)  # [groups, members, axes]
    varies = (places != places[:, :1]).any(axis=(0, 1))
    names = [name for name, differs in zip(mesh_shape, varies, strict=True) if differs]
    if not names:
        return "none"
    spanned = math.prod(mesh_shape[name] for name in names)
    label = "+".join(names)
    if permutation or groups.shape[1] == spanned:
        return label
    return f"{label}/{groups.shape[1]}" if len(names) == 1 else f"mixed/{groups.shape[1]}"


def _attribute(instruction: Instruction, name: str) -> str | None:
    """Up to the next attribute: the mesh form has a blank in it."""
    match = re.search(rf"\b{name}=(.*?)(?:, \w+=|$)", instruction.attributes)
    return match.group(1).strip() if match else None


def _explicit(text: str) -> Groups:
    rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)]
    return np.array(rows)


def _iota(text: str) -> Groups:
    """`[2,4]<=[4,2]T(1,0)`."""
    match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"replica_groups={text!r} is in a form not known here")
    shape, reshape = (_numbers(match.group(i)) for i in (1, 2))
    ids = np.arange(math.prod(reshape)).reshape(reshape)
    if match.group(3):
        ids = ids.transpose(_numbers(match.group(3)))
    return ids.reshape(shape)


def _mesh_form(text: str) -> Groups:
    """`mesh['a'=4,'b'=2] {'a'}`; an axis may be a part, 'a':(2)2, and devices in an iota order."""
    head, _, chosen = text.partition("] {")
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", head)]
    order = re.search(r"device_ids=\(?(\[[\d,]+\]<=[^)]*(?:T\([\d,]+\))?)\)?", head)
    sizes = [size for _, size in axes]
    ids = np.arange(math.prod(sizes)) if order is None else _iota(order.group(1)).reshape(-1)
    # Axes of which only a part is meant are cut in three: before, the part, after.
    cut: list[tuple[str, int]] = []
    wanted: list[str] = []
    parts = dict.fromkeys(re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen))
    for name, size in axes:
        mine = [(int(before), int(n)) for part, before, n in parts if part == name and n]
        if not mine:
            cut.append((name, size))
            continue
        before, n = mine[0]
        cut += [(f"{name}<", before), (f"{name}=", n), (f"{name}>", size // (before * n))]
    for name, before, _ in parts:
        wanted.append(f"{name}=" if before else name)
    names = [name for name, _ in cut]
    grid = ids.reshape([size for _, size in cut])
    last = [names.index(name) for name in wanted]
    first = [i for i in range(len(names)) if i not in last]
    members = math.prod(cut[i][1] for i in last)
    return grid.transpose([*first, *last]).reshape(-1, members)


def _numbers(text: str) -> Sequence[int]:
    return [int(n) for n in text.split(",")]
