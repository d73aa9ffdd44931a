"""De-duplication against exact Jaccard similarities on a corpus with known copies."""

import random
import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from data_beam.kernels.textstats import Signals
from data_beam.schema import Document, document_id
from data_beam.transforms import dedup
from internlm2_jax.errors import UserError

NEAR = dedup.NearDuplicates()
WORDS = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")  # one Han character, or a run of others


def shingle_set(text: str) -> set[tuple[str, ...]]:
    words = WORDS.findall(text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def edit(rng: random.Random, words: list[str], share: float, pool: list[str]) -> list[str]:
    """Replaces, deletes or inserts `share` of the words."""
    out = []
    for word in words:
        if rng.random() >= share:
            out.append(word)
        elif (kind := rng.randrange(3)) < 2:
            out += [rng.choice(pool)] if kind == 0 else [word, rng.choice(pool)]
    return out


def make_corpus() -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Texts by name, and for each injected copy (original, kind)."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    latin = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(4000)]
    han = [chr(0x4E00 + n) for n in range(2500)]
    header = rng.choices(latin, k=60)
    texts, copies = {}, {}
    for number in range(260):
        chinese = number % 4 == 0
        pool, join = (han, "") if chinese else (latin, " ")
        words = rng.choices(pool, k=rng.randint(150, 700))
        if number % 5 == 1:  # a licence header in common: no reason to remove anything
            words = header + words
        name = f"{'zh' if chinese else 'en'}{number}"
        texts[name] = join.join(words)
        for kind, share in {"0.5%": 0.005, "1%": 0.01, "2%": 0.02, "4%": 0.04, "30%": 0.3}.items():
            if rng.random() < 0.35:
                texts[f"{name}-{kind}"] = join.join(edit(rng, words, share, pool))
                copies[f"{name}-{kind}"] = (name, kind)
        if rng.random() < 0.2:
            spaced = texts[name].upper().replace(" ", "\n ") if not chinese else texts[name] + "。"
            texts[f"{name}-format"] = spaced
            copies[f"{name}-format"] = (name, "format")
    return texts, copies


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


@pytest.fixture(scope="module")
def jaccard(corpus):
    """Exact similarity of every pair that shares a shingle."""
    texts, _ = corpus
    sets = {name: shingle_set(text) for name, text in texts.items()}
    holders, common = defaultdict(list), Counter()
    for name, shingles in sets.items():
        for shingle in shingles:
            holders[shingle].append(name)
    for names in holders.values():
        common.update(combinations(sorted(names), 2))
    return {pair: n / (len(sets[pair[0]]) + len(sets[pair[1]]) - n) for pair, n in common.items()}


def deduplicate(documents: list[Document], near=NEAR) -> dict[str, str]:
    """Removed id -> surviving id, by the functions that the Beam job applies to its groups."""
    by_text, buckets, exact = defaultdict(list), defaultdict(list), []
    for document in documents:
        print_ = dedup.fingerprint(document, Signals(document.text).words, near, 0)
        by_text[print_.text_hash].append(print_)
    for group in by_text.values():
        survivor, gone = dedup.exact_duplicates(group)
        exact += gone
        for key, member in dedup._bands(survivor):
            buckets[key].append(member)
    edges = [e for some in buckets.values() for e in dedup.verified_edges(some, near.threshold)]
    near_drops = {drop.id: drop for drop in dedup.components(edges)}
    removed = {name: drop.of_id for name, drop in near_drops.items()}
    for drop in exact:
        own = [near_drops[drop.of_id]] if drop.of_id in near_drops else []
        removed |= {one.id: one.of_id for one in dedup.final_survivor([drop], own)}
    assert not removed.keys() & set(removed.values())
    return removed


@pytest.fixture(scope="module")
def found(corpus):
    """Removed name -> surviving name."""
    names = {document_id("t", name): name for name in corpus[0]}
    documents = [Document(i, corpus[0][name], "text") for i, name in names.items()]
    removed = deduplicate(documents)
    assert deduplicate(documents[::-1]) == removed
    return {names[gone]: names[kept] for gone, kept in removed.items()}


def cluster(found: dict[str, str], name: str) -> str:
    return found.get(name, name)


def test_pairs_above_the_threshold_meet(found, jaccard):
    recall = {}
    for low, high in ((0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        pairs = [pair for pair, value in jaccard.items() if low <= value < high]
        assert len(pairs) >= 25
        hits = sum(cluster(found, a) == cluster(found, b) for a, b in pairs)
        recall[low] = hits / len(pairs)
    assert recall[0.7] >= 0.8 and recall[0.8] >= 0.97 and recall[0.9] == 1.0, recall


def test_what_is_removed_has_a_similar_partner_in_its_cluster(found, jaccard):
    def best(name):
        return max(
            (value for pair, value in jaccard.items() if name in pair
             and cluster(found, pair[0]) == cluster(found, pair[1])),
            default=0.0,
        )  # fmt: skip

    values = [best(name) for name in found]
    assert sum(value >= 0.7 for value in values) / len(values) >= 0.95
    assert min(values) >= 0.58  # four standard errors below the threshold


def test_copies_are_found_in_chinese_as_in_english(corpus, found):
    for language in ("en", "zh"):
        for kind, least in (("format", 1.0), ("0.5%", 1.0), ("1%", 0.97)):
            of_kind = [(copy, original) for copy, (original, k) in corpus[1].items()
                       if k == kind and copy.startswith(language)]  # fmt: skip
            hits = sum(cluster(found, a) == cluster(found, b) for a, b in of_kind)
            assert len(of_kind) >= 8 and hits / len(of_kind) >= least, (language, kind)


def test_different_documents_stay(corpus, found):
    texts, copies = corpus
    heavy = {copy for copy, (_, kind) in copies.items() if kind == "30%"}
    assert heavy and not heavy & found.keys()
    # Of every original something is left, whatever header it shares with the others.
    originals = {name for name in texts if name not in copies}
    survivors = {cluster(found, name).partition("-")[0] for name in originals}
    assert survivors == originals


def test_the_newest_survives_then_the_longest():
    text = " ".join(f"word{n}" for n in range(300))
    old = Document("0" * 32, text + " more at the end", "text", dump="CC-MAIN-2019-04")
    new = Document("f" * 32, text, "text", dump="CC-MAIN-2023-50")
    assert deduplicate([old, new]) == {old.id: new.id}
    assert deduplicate([old._replace(dump=""), new._replace(dump="")]) == {new.id: old.id}
    late = old._replace(id="1" * 32, dump="", timestamp=9)
    assert deduplicate([new._replace(dump=""), late]) == {new.id: late.id}


def test_a_chain_is_one_cluster_and_a_crowded_bucket_is_linear():
    labels = [bytes([0] * 24 + [n] * 16) for n in range(5)]
    edges = [(labels[n], labels[n + 1], 0.8) for n in (3, 1, 0)]
    assert [(d.id[:2], d.of_id[:2]) for d in dedup.components(edges)] == [
        ("01", "00"), ("02", "00"), ("04", "03")]  # fmt: skip
    members = [(n.to_bytes(40, "big"), bytes(256)) for n in range(5000)]
    edges = list(dedup.verified_edges(reversed(members), 0.7))
    assert len(edges) == 4999 and {edge[0] for edge in edges} == {members[0][0]}


def test_bad_settings():
    with pytest.raises(UserError, match="needs 160 hashes"):
        dedup.NearDuplicates(bands=20)
    with pytest.raises(UserError, match="threshold"):
        dedup.NearDuplicates(threshold=70)
