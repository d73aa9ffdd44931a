"""The order of a repository's files: what is needed comes first (the InternLM2 report, section
3.1.2: topological sort of the import relations, cycles begun alphabetically).

Of several files that could come next, the one with the shorter path (fewer folders) does, then the
alphabet decides, so the order depends on the names and the imports alone. A cycle is entered at its
alphabetically first file, among those whose hard needs are met if there are any: an import inside a
function, or one that is only guessed, is given up before one that runs when the file is loaded.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping

from data_beam.code.resolvers.repository import preference

Edges = Mapping[str, Mapping[str, bool]]

# Edges looked at to find the cycles that remain inside one big cycle; beyond it, files are taken
# alphabetically. Repositories of ten thousand files in one cycle exist.
_BUDGET = 2_000_000


def components(nodes: Iterable[str], edges: Edges, hard: bool = False) -> list[list[str]]:
    """Strongly connected components among `nodes` (Tarjan, without recursion), needed ones first;
    `hard` looks at those edges only."""
    inside = set(nodes)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    on_stack: set[str] = set()
    stack: list[str] = []
    found: list[list[str]] = []
    for start in sorted(inside):
        if start in index:
            continue
        work = [(start, _needs(start, edges, inside, hard))]
        index[start] = low[start] = len(index)
        stack.append(start)
        on_stack.add(start)
        while work:
            node, needs = work[-1]
            if needs:
                needed = needs.pop()
                if needed not in index:
                    index[needed] = low[needed] = len(index)
                    stack.append(needed)
                    on_stack.add(needed)
                    work.append((needed, _needs(needed, edges, inside, hard)))
                elif needed in on_stack:
                    low[node] = min(low[node], index[needed])
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == index[node]:
                component = [stack.pop()]
                while component[-1] != node:
                    component.append(stack.pop())
                on_stack.difference_update(component)
                found.append(component)
    return found


def _needs(node: str, edges: Edges, inside: Collection[str], hard: bool) -> list[str]:
    needed = edges.get(node, {})
    return [other for other, is_hard in needed.items() if other in inside and (is_hard or not hard)]


def sources(nodes: Collection[str], edges: Edges, hard: bool = False) -> list[list[str]]:
    """The components that need no other one of `nodes`."""
    found = []
    for component in components(nodes, edges, hard):
        own = set(component)
        if all(own.issuperset(_needs(node, edges, nodes, hard)) for node in component):
            found.append(component)
    return found


def order(nodes: Iterable[str], edges: Edges) -> list[str]:
    """`nodes`, each after those it needs. Edges to what is not among them do not count."""
    groups = components(nodes, edges)
    group_of = {node: number for number, group in enumerate(groups) for node in group}
    dependents: list[set[int]] = [set() for _ in groups]
    open_needs = [0] * len(groups)
    for number, group in enumerate(groups):
        needed = {group_of[o] for node in group for o in edges.get(node, ()) if o in group_of}
        needed.discard(number)
        open_needs[number] = len(needed)
        for other in needed:
            dependents[other].add(number)
    ready = [
        (min(map(preference, group)), number)
        for number, group in enumerate(groups)
        if not open_needs[number]
    ]
    heapq.heapify(ready)
    result: list[str] = []
    while ready:
        _, number = heapq.heappop(ready)
        group = groups[number]
        result += group if len(group) == 1 else _inside_cycle(group, edges)
        for other in dependents[number]:
            open_needs[other] -= 1
            if not open_needs[other]:
                heapq.heappush(ready, (min(map(preference, groups[other])), other))
    return result


def _inside_cycle(group: list[str], edges: Edges) -> list[str]:
    """Files that all need each other, directly or not."""
    remaining = set(group)
    open_needs = {node: set(_needs(node, edges, remaining, False)) for node in group}
    dependents: dict[str, list[str]] = {node: [] for node in group}
    for node, needed in open_needs.items():
        for other in needed:
            dependents[other].append(node)
    ready: list[tuple[tuple[int, str], str]] = []
    result: list[str] = []
    budget = _BUDGET

    def emit(node: str) -> None:
        result.append(node)
        remaining.discard(node)
        for other in dependents[node]:
            open_needs[other].discard(node)
            if not open_needs[other] and other in remaining:
                heapq.heappush(ready, (preference(other), other))

    while remaining:
        if ready:
            emit(heapq.heappop(ready)[1])
            continue
        pool: Collection[str] = remaining
        budget -= sum(map(len, (open_needs[node] for node in remaining))) + len(remaining)
        if budget > 0:
            pool = set(min(sources(remaining, edges), key=min))
            pool = {node for part in sources(pool, edges, hard=True) for node in part}
        emit(min(pool))
    return result
