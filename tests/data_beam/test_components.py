"""Stars against union-find on random graphs; paths, the worst case, converge."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_beam import runners
from data_beam.dedup import blobs, components
from data_beam.runners import beam


def union_find(pairs: list[tuple[int, int]]) -> dict[int, int]:
    """Least member of the component of every node."""
    parent: dict[int, int] = {}

    def find(node: int) -> int:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in pairs:
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    return {node: find(node) for node in parent}


def table(pairs: list[tuple[int, int]]) -> np.ndarray:
    both = np.array(pairs, np.uint64).reshape(-1, 2)
    return components.edges(both[:, 0], both[:, 1])


def as_dict(forest: np.ndarray) -> dict[int, int]:
    """Centre of every node, from edges seen from both ends."""
    rows = components.members(forest)
    return dict(zip(rows["node"].tolist(), rows["other"].tolist(), strict=True))


def without_loops(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in pairs if a != b]


GRAPHS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60)


@given(GRAPHS)
def test_stars_in_one_process_are_the_components(pairs):
    forest = components.mirrored(components.local(table(pairs)))
    assert components.unconverged(forest) == 0
    assert as_dict(forest) == union_find(without_loops(pairs))


@given(GRAPHS)
def test_each_step_keeps_the_components(pairs):
    edges, truth = table(pairs), union_find(without_loops(pairs))
    large = components.large_star(components.mirrored(edges))
    small = components.small_star(large)
    for step in (large, small):
        assert (step["node"] > step["other"]).all()
        assert union_find([tuple(map(int, row)) for row in step.tolist()]) == truth


@given(GRAPHS)
def test_unconverged_is_zero_for_forests_of_stars_alone(pairs):
    pairs = sorted({(min(pair), max(pair)) for pair in without_loops(pairs)})
    children = {b for _, b in pairs}
    is_forest = len(children) == len(pairs) and not children & {a for a, _ in pairs}
    assert (components.unconverged(components.mirrored(table(pairs))) == 0) == is_forest


def test_a_path_of_twenty_thousand_takes_about_log_n_rounds():
    nodes = np.random.default_rng(0).permutation(20_000).astype(np.uint64)
    edges, rounds = components.edges(nodes[1:], nodes[:-1]), 0
    counts = []
    while counts[-1:] != [0]:
        edges = components.small_star(components.large_star(components.mirrored(edges)))
        counts.append(components.unconverged(components.mirrored(edges)))
        rounds += 1
        assert rounds <= 16
    assert rounds >= 5  # else the job's own further rounds would never be needed
    assert set(as_dict(components.mirrored(edges)).values()) == {0}


def save(blob, folder):
    (folder / f"{blob[0]}.edges").write_bytes(blob[1])


def collect(
    edges: list[np.ndarray], rounds: int, partitions: int, folder: Path
) -> tuple[np.ndarray, int]:
    """The edges after the rounds, and how many of them are unconverged."""
    pipeline = runners.pipeline()
    stars = (
        pipeline
        | beam.Create([(0, piece.tobytes()) for piece in edges])
        | components.ConnectedComponents(rounds, partitions)
    )
    folder.mkdir()
    _ = stars.edges | "Save" >> beam.Map(save, folder)
    _ = (
        stars.unconverged
        | beam.CombineGlobally(sum)
        | "Count" >> beam.Map(lambda count: (folder / "count").write_text(str(count)))
    )
    runners.run(pipeline)
    pieces = [path.read_bytes() for path in sorted(folder.glob("*.edges"))]
    return blobs.gather(pieces, components.EDGE), int((folder / "count").read_text())


@pytest.mark.parametrize(("rounds", "partitions"), [(5, 7), (0, 3)])
def test_the_beam_transform_finds_the_components(rounds, partitions, monkeypatch, tmp_path):
    monkeypatch.setattr(blobs, "PIECE_BYTES", 200)  # many pieces
    rng = np.random.default_rng(3)
    pairs = rng.integers(0, 900, (500, 2)).tolist()
    pieces = [table([tuple(pair) for pair in pairs[start::4]]) for start in range(4)]
    forest, unconverged = collect(pieces, rounds, partitions, tmp_path / "stars")
    assert unconverged == 0
    assert as_dict(forest) == union_find(without_loops([tuple(pair) for pair in pairs]))


def test_too_few_rounds_are_counted_and_can_be_continued(tmp_path):
    path = table([(n, n + 1) for n in range(300)])
    forest, unconverged = collect([path], 3, 4, tmp_path / "0")
    assert unconverged > 0
    attempts = 1
    while unconverged and attempts < 12:
        forest, unconverged = collect([forest], 3, 4, tmp_path / f"{attempts}")
        attempts += 1
    assert as_dict(forest) == dict.fromkeys(range(301), 0)
