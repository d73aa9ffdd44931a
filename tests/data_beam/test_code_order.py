"""The order of files against brute force on random graphs."""

import itertools
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from data_beam.code import order as order_module
from data_beam.code.order import components, order

PATHS = ["a.py", "b.py", "c.py", "x/a.py", "x/b.py", "x/y/a.py", "z/a.py"]


@st.composite
def graphs(draw):
    nodes = draw(st.lists(st.sampled_from(PATHS), unique=True, min_size=1))
    pairs = st.tuples(st.sampled_from(nodes), st.sampled_from(nodes))
    chosen = draw(st.dictionaries(pairs, st.booleans(), max_size=12))
    edges = {node: {} for node in nodes}
    for (one, other), hard in chosen.items():
        if one != other:
            edges[one][other] = hard
    return nodes, edges


def reachable(edges, start, hard_only=False):
    seen, stack = set(), [start]
    while stack:
        for other, hard in edges.get(stack.pop(), {}).items():
            if (hard or not hard_only) and other not in seen:
                seen.add(other)
                stack.append(other)
    return seen


@given(graphs())
@settings(max_examples=300)
def test_a_permutation_with_dependencies_first_outside_cycles(graph):
    nodes, edges = graph
    result = order(nodes, edges)
    assert sorted(result) == sorted(nodes)
    place = {node: number for number, node in enumerate(result)}
    for node, needed in edges.items():
        for other in needed:
            if node not in reachable(edges, other):
                assert place[other] < place[node]


@given(graphs(), st.randoms())
def test_independent_of_the_order_of_the_input(graph, random):
    nodes, edges = graph
    shuffled = list(nodes)
    random.shuffle(shuffled)
    again = {
        node: dict(random.sample(list(edges[node].items()), len(edges[node]))) for node in shuffled
    }
    assert order(shuffled, again) == order(nodes, edges)


@given(graphs())
def test_without_cycles_the_least_order_by_depth_and_alphabet(graph):
    nodes, edges = graph
    if any(node in reachable(edges, node) for node in nodes):
        return
    # At each step the least file whose needs are met.
    expected, left = [], set(nodes)
    while left:
        ready = [node for node in left if not left & edges[node].keys()]
        expected.append(min(ready, key=lambda path: (path.count("/"), path)))
        left.discard(expected[-1])
    assert order(nodes, edges) == expected


@given(graphs())
def test_components_are_mutual_reachability(graph):
    nodes, edges = graph
    for hard in (False, True):
        found = components(nodes, edges, hard)
        assert sorted(itertools.chain(*found)) == sorted(nodes)
        group = {node: number for number, some in enumerate(found) for node in some}
        for one, other in itertools.combinations(nodes, 2):
            mutual = other in reachable(edges, one, hard) and one in reachable(edges, other, hard)
            assert (group[one] == group[other]) == mutual
        for node, needed in edges.items():  # needed ones first
            for other, is_hard in needed.items():
                assert (hard and not is_hard) or group[other] <= group[node]


def test_a_cycle_begins_alphabetically():
    edges = {"c": {"b": True}, "b": {"a": True}, "a": {"c": True}, "d": {"a": True}, "e": {}}
    # a, although it needs c; then what a was missing for.
    assert order("edcba", edges) == ["a", "b", "c", "d", "e"]


def test_what_is_needed_later_only_is_given_up_first():
    # a imports b inside a function; b needs a to be loaded.
    edges = {"b": {"a": True}, "a": {"b": False}}
    assert order("ab", edges) == ["a", "b"]
    edges = {"a": {"b": True}, "b": {"a": False}}
    assert order("ab", edges) == ["b", "a"]
    # The cycle of hard needs is entered at x, not at a, whose name is less but which needs x.
    edges = {"a": {"x": True}, "x": {"y": True}, "y": {"x": True, "a": False}}
    assert order("axy", edges) == ["x", "a", "y"]


def test_shorter_paths_first():
    assert order(["d/e/f", "z", "a/b", "y/z"], {}) == ["z", "a/b", "y/z", "d/e/f"]


def test_edges_out_of_the_repository_do_not_count():
    assert order(["b", "a"], {"a": {"gone": True}, "b": {"a": True}, "other": {"a": True}}) == [
        "a",
        "b",
    ]


def test_deep_chains_and_big_cycles_end_in_time():
    names = [f"{n:04d}" for n in range(5_000)]
    chain = {one: {other: True} for one, other in itertools.pairwise(names)}
    start = time.process_time()
    assert order(names, chain) == names[::-1]
    chain[names[-1]] = {names[0]: True}
    result = order(names, chain)
    assert sorted(result) == names and result[0] == names[0]
    clique = [f"{n:03d}" for n in range(150)]
    everything = {one: dict.fromkeys(clique, True) for one in clique}
    assert order(clique, everything) == clique
    assert time.process_time() - start < 8


def test_beyond_the_budget_the_order_is_still_a_permutation(monkeypatch):
    monkeypatch.setattr(order_module, "_BUDGET", 0)
    edges = {"a": {"b": True, "c": True}, "b": {"c": True}, "c": {"a": True}, "d": {"a": True}}
    result = order("dcba", edges)
    assert sorted(result) == list("abcd") and result[-1] == "d"
