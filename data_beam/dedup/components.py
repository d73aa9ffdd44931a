"""Connected components of a graph of uint64 nodes: alternating large-star and small-star (Kiveris
et al. 2014, "Connected Components in MapReduce and Beyond").

Both steps replace a node's edges by edges to the least of its neighbours. They keep the components,
and every component ends as a star around its least node: in practice after two to four rounds, on a
path of n nodes in about log n. No step needs the whole graph, so each is one shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_beam.dedup import blobs
from data_beam.kernels.labels import order, run_starts
from data_beam.runners import beam

# (node, other): an edge, kept where `node` is.
EDGE = np.dtype([("node", "<u8"), ("other", "<u8")])


def edges(nodes: np.ndarray, others: np.ndarray) -> np.ndarray:
    table = np.empty(len(nodes), EDGE)
    table["node"], table["other"] = nodes, others
    return table


def mirrored(table: np.ndarray) -> np.ndarray:
    """Every edge from both of its ends."""
    return np.concatenate([table, edges(table["other"], table["node"])])


def _sorted(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct edges by node, then other; and for each the row at which its node begins."""
    rows = order((table["node"], table["other"]))
    node, other = table["node"][rows], table["other"][rows]
    distinct = run_starts(node, other) & (node != other)
    node, other = node[distinct], other[distinct]
    first = run_starts(node)
    return node, other, np.flatnonzero(first)[np.cumsum(first) - 1]


def large_star(table: np.ndarray) -> np.ndarray:
    """From edges seen from both ends: every larger neighbour of a node to the least of its
    neighbours and itself. `node` > `other` in the result."""
    node, other, begins = _sorted(table)
    least = np.minimum(node, other[begins])
    larger = other > node
    return edges(other[larger], least[larger])


def small_star(table: np.ndarray) -> np.ndarray:
    """From edges seen from the larger end: the node and all its neighbours to the least."""
    node, other, begins = _sorted(table)
    least = other[begins]
    rest = other != least
    first = run_starts(node)
    return edges(
        np.concatenate([other[rest], node[first]]), np.concatenate([least[rest], least[first]])
    )


def unconverged(table: np.ndarray) -> int:
    """Of edges seen from both ends: how many keep the graph from being a forest of stars (a second
    parent, or a child of a node that has a parent). Zero exactly when it is one."""
    node, other, _ = _sorted(table)
    parents = np.add.reduceat(other < node, _begins(node)) if len(node) else np.zeros(0, np.int64)
    children = np.add.reduceat(other > node, _begins(node)) if len(node) else parents
    has = parents > 0
    return int((parents[has] - 1 + children[has]).sum())


def _begins(sorted_keys: np.ndarray) -> np.ndarray:
    return np.flatnonzero(run_starts(sorted_keys))


def members(table: np.ndarray) -> np.ndarray:
    """Of a forest of stars seen from both ends: (node, its centre), centres included."""
    node, other, begins = _sorted(table)
    first = run_starts(node)
    return edges(node[first], np.minimum(node, other[begins])[first])


def local(table: np.ndarray) -> np.ndarray:
    """All rounds in this process: the forest of stars, as edges from the larger end."""
    table = edges(np.maximum(table["node"], table["other"]),
                  np.minimum(table["node"], table["other"]))  # fmt: skip
    while unconverged(mirrored(table)):
        table = small_star(large_star(mirrored(table)))
    node, other, _ = _sorted(table)
    return edges(node, other)


def _route(table: np.ndarray, partitions: int) -> Iterator[blobs.Blob]:
    yield from blobs.route(table, blobs.partition_of(table["node"], partitions))


class _Mirror(beam.DoFn):
    """Pieces of edges -> the same, at the partitions of both ends."""

    def __init__(self, partitions: int):
        super().__init__()
        self.partitions = partitions

    def process(self, element):
        yield from _route(mirrored(np.frombuffer(element[1], EDGE)), self.partitions)


class _Star(beam.DoFn):
    """(partition, pieces of edges) -> the result of a step, at the partitions of the next: large
    stars at the larger ends, small stars at both ends."""

    def __init__(self, large: bool, partitions: int):
        super().__init__()
        self.large, self.partitions = large, partitions

    def process(self, element):
        table = blobs.gather(element[1], EDGE)
        table = large_star(table) if self.large else mirrored(small_star(table))
        yield from _route(table, self.partitions)


class _Check(beam.DoFn):
    """(partition, edges from both ends) -> (partition, edges); the unconverged ones counted."""

    def process(self, element):
        partition, pieces = element
        table = blobs.gather(pieces, EDGE)
        yield beam.pvalue.TaggedOutput("unconverged", unconverged(table))
        yield partition, table.tobytes()


class _Local(beam.DoFn):
    """(0, all edges) -> (0, edges from both ends), converged."""

    def process(self, element):
        yield beam.pvalue.TaggedOutput("unconverged", 0)
        yield 0, mirrored(local(blobs.gather(element[1], EDGE))).tobytes()


class ConnectedComponents(beam.PTransform):
    """Pieces of edges -> `edges` (partition, edges seen from both ends) and `unconverged` (counts
    whose sum is 0 when these are a forest of stars). `rounds` = 0: all edges in one worker."""

    def __init__(self, rounds: int, partitions: int):
        super().__init__()
        self.rounds, self.partitions = rounds, partitions

    def expand(self, pieces):
        if not self.rounds:
            return (
                pieces
                | "ToOneWorker" >> beam.Map(_to_zero).with_output_types(blobs.TYPE)
                | "AllEdges" >> beam.GroupByKey()
                | "Local" >> blobs.par_do(_Local(), "edges", unconverged=int)
            )
        pieces = pieces | "Mirror" >> blobs.par_do(_Mirror(self.partitions))
        for number in range(1, self.rounds + 1):
            for large in (True, False):
                name = f"{'Large' if large else 'Small'}Star{number}"
                pieces = (
                    pieces
                    | f"By{name}" >> beam.GroupByKey()
                    | name >> blobs.par_do(_Star(large, self.partitions))
                )
        return (
            pieces
            | "ByCheck" >> beam.GroupByKey()
            | "Check" >> blobs.par_do(_Check(), "edges", unconverged=int)
        )


def _to_zero(blob: blobs.Blob) -> blobs.Blob:
    return 0, blob[1]
