"""Attributes of one text: language, block lists, personal data, signals."""

import dataclasses
import gzip
import hashlib
import math
import pickle
import random
import re
from pathlib import Path

import fasttext
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_beam.attributes import language
from data_beam.attributes.base import Examined, settings_of
from data_beam.attributes.language import Language, bcp47
from data_beam.attributes.pii import PersonalData
from data_beam.attributes.safety import BlockedDomains, BlockedWords
from data_beam.attributes.signals import C4Lines, TextSignals
from data_beam.kernels import blocklists
from data_beam.kernels.blocklists import Domains, Phrases, host_of
from data_beam.schema import Document
from internlm2_jax.errors import UserError

ENGLISH = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so every day."
GERMAN = (
    "Der schnelle braune Fuchs springt über den faulen Hund, und niemand weiß, warum er es tut."
)
CHINESE = "今天天气很好，我们一起去公园散步，看见许多孩子在草地上放风筝，大家都很高兴。"
TEXTS = [
    "",
    " \n",
    "!",
    ENGLISH,
    GERMAN * 3,
    CHINESE,
    ENGLISH * 200,
    "\x00\ud800 hello",
    "x" * 5000,
]


def examined(text: str = "", **fields) -> Examined:
    return Examined(Document("0" * 32, text, **{"source": "text", **fields}))


def values(attribute, documents: list[Examined]) -> pa.Table:
    attribute.setup()
    return pa.table(attribute.compute(documents), attribute.schema)


@pytest.fixture
def lists(tmp_path):
    """(domains, words): two block lists."""
    (tmp_path / "domains.txt").write_text("# bad ones\nbad.com\n0.0.0.0 worse.org\n*.evil.net\n")
    (tmp_path / "words.txt").write_text("# words\nASS\nfree   money\n赌博\n")
    return str(tmp_path / "domains.txt"), str(tmp_path / "words.txt")


@pytest.fixture
def attributes(lists):
    domains, words = lists
    return [TextSignals(), C4Lines(), Language(), PersonalData(), BlockedDomains((domains,)),
            BlockedWords((words,))]  # fmt: skip


def test_values_depend_on_the_document_alone(attributes):
    urls = ["", "http://bad.com/x", "https://www.worse.org", "ftp://good.com", "no url"]
    batch = [examined(text, url=urls[i % len(urls)]) for i, text in enumerate(TEXTS * 8)]
    for attribute in attributes:
        together = values(attribute, batch)
        alone = pa.concat_tables(
            [values(attribute, [Examined(one.document)]) for one in batch[: len(TEXTS) * 3]]
        )
        assert together.num_rows == len(batch)
        # As JSON, for NaN is not equal to itself.
        assert repr(together.slice(0, len(alone)).to_pylist()) == repr(alone.to_pylist())


def test_attributes_travel_to_workers_and_into_manifests(attributes):
    import orjson

    for attribute in attributes:
        attribute.setup()
        copy = pickle.loads(pickle.dumps(attribute))
        assert copy == attribute
        assert orjson.loads(orjson.dumps(settings_of(attribute)))["attribute"] == attribute.name
        assert dataclasses.replace(attribute) == attribute


def test_signals_say_nothing_where_they_mean_nothing():
    row = values(TextSignals(), [examined(CHINESE)]).to_pylist()[0]
    assert math.isnan(row["mean_word_length"]) and row["num_chars"] == len(CHINESE)
    assert TextSignals.schema.field("num_words").type == pa.int32()
    assert TextSignals.schema.field("letter_share").type == pa.float32()


def test_of_a_long_text_the_head_is_looked_at():
    rows = values(TextSignals(max_chars=20), [examined("x" * 20), examined("x" * 20 + " 1 2 3")])
    short, long = rows.to_pylist()
    assert (short.pop("num_chars"), long.pop("num_chars")) == (20, 26)
    assert repr(short) == repr(long)


def test_c4_lines_are_spans_of_the_text():
    text = f"Menu | Home\n{ENGLISH}\n\nshort.\n{CHINESE}\n"
    row = values(C4Lines(), [examined(text)]).to_pylist()[0]
    rest = "".join(
        text[start:end]
        for start, end in zip([0, *row["removed"][1::2]], [*row["removed"][::2], None], strict=True)
    )
    assert rest == f"{ENGLISH}\n{CHINESE}\n"
    assert (row["lines"], row["sentences"]) == (2, 2)
    assert row["kept_share"] == pytest.approx(len(rest) / len(text))


# Language


def test_languages_of_sentences():
    batch = [examined(text) for text in (ENGLISH, GERMAN, CHINESE, "", "12 + 34", "\x00\ud800")]
    rows = values(Language(), batch).to_pylist()
    assert [row["lang"] for row in rows] == ["en", "de", "zh", "und", "und", "und"]
    assert [row["probability"] for row in rows] == [1, 1, 1, 0, 0, 0]
    mixed = values(Language(), [examined((ENGLISH + "\n") * 3 + GERMAN)]).to_pylist()[0]
    assert (mixed["lang"], mixed["second"]) == ("en", "de")
    assert 0.6 < mixed["share"] < 0.9 and 0.1 < mixed["second_share"] < 0.4


def test_long_texts_are_sampled_from_end_to_end():
    text = ENGLISH * 100 + GERMAN * 400
    row = values(Language(), [examined(text)]).to_pylist()[0]
    assert (row["lang"], row["second"]) == ("de", "en")
    assert len(language.sample("x" * 100_000)) == language._SAMPLE + language._WINDOWS - 1
    assert language.sample("ab" * 4000) == "ab" * 4000


@given(st.text(st.characters(), max_size=50))
@settings(max_examples=200, deadline=None)
def test_no_character_stops_the_detector(text):
    values(Language(), [examined(text + " and " + ENGLISH)])


def test_every_refused_character_is_caught():
    everything = "".join(map(chr, [*range(0x3000), *range(0xD7F0, 0x10000), 0x1FFFE, 0x10FFFF]))
    assert values(Language(), [examined(everything)]).num_rows == 1


def test_code_keeps_its_language():
    row = values(Language(), [examined("int main() {}", source="code", lang="C")]).to_pylist()[0]
    assert row["lang"] == "C" and math.isnan(row["probability"])


def test_tags_are_bcp47():
    assert [bcp47(code) for code in ("iw", "zh-Hant", "xx-Qaai", "zzp", "eng_Latn", "un")] == [
        "he", "zh-Hant", "und", "und", "eng-Latn", "und"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A fastText model of the user's own that knows two languages."""
    folder = tmp_path_factory.mktemp("lid")
    rng = random.Random(0)
    rows = []
    for lang, text in (("en", ENGLISH), ("de", GERMAN)):
        for _ in range(200):
            rows.append(f"__label__{lang} {' '.join(rng.sample(text.split(), 8))}\n")
    (folder / "train.txt").write_text("".join(rows))
    trained = fasttext.train_supervised(
        str(folder / "train.txt"), epoch=10, dim=8, minn=2, maxn=3, bucket=5000, thread=1, verbose=0
    )
    trained.save_model(str(folder / "lid.bin"))
    return str(folder / "lid.bin")


def test_a_fasttext_model_of_ones_own(model):
    attribute = Language(backend="fasttext", model_file=model)
    rows = values(attribute, [examined(text) for text in (ENGLISH, GERMAN, " \n")]).to_pylist()
    assert [row["lang"] for row in rows] == ["en", "de", "und"]
    assert rows[0]["probability"] > 0.9 and rows[0]["second"] == "de"
    assert math.isnan(rows[0]["share"])
    with open(model, "rb") as file:
        assert attribute.digest == hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def test_wrong_language_settings(tmp_path, model, monkeypatch):
    (tmp_path / "not.bin").write_text("not a model")
    cases = [
        ({"backend": "cld3"}, "neither cld2 nor fasttext"),
        ({"backend": "fasttext", "model_file": str(tmp_path / "none.bin")}, "none.bin"),
        ({"model_file": model}, "needs the backend fasttext"),
        ({"backend": "fasttext", "model_file": model, "digest": "0"}, "has changed"),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message) as error:
            Language(**fields)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"not\.bin is not a fastText model"):
        Language(backend="fasttext", model_file=str(tmp_path / "not.bin")).setup()
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no language model for fasttext"):
        Language(backend="fasttext")


SCRIPTS = {"ja": "[\u3040-\u30ff]", "zh_CN": "[\u4e00-\u9fff]", "ko": "[\uac00-\ud7af]",
           "ru": "[а-яА-Я]", "uk": "[а-яА-ЯіїєІЇЄ]"}  # fmt: skip


def manual(folder: str) -> list[str]:
    """Pages, of languages with a script of their own only the lines in it: much of many pages was
    never translated."""
    pages = []
    for path in sorted(Path("/usr/share/man", folder).glob("man*/*.gz"))[:60]:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").split("\n")
        if script := SCRIPTS.get(folder):
            lines = [line for line in lines if len(re.findall(script, line)) > len(line) / 3]
        else:
            lines = [line for line in lines if not line.startswith((".", "'"))]
        if sum(map(len, lines)) > 500:
            pages.append("\n".join(lines))
    return pages


@pytest.mark.parametrize("folder", ["de", "fr", "ja", "ko", "pl", "pt_BR", "ru", "uk", "zh_CN"])
def test_languages_of_manual_pages(folder):
    pages = manual(folder)
    if len(pages) < 5:
        pytest.skip(f"fewer than five manual pages in {folder} on this machine")
    expected = folder.partition("_")[0]
    found = values(Language(), [examined(page) for page in pages])["lang"].to_pylist()
    right = sum(lang.partition("-")[0] == expected for lang in found)
    assert right / len(pages) >= (0.95 if folder in SCRIPTS else 0.7)


# Domains


def test_domains_match_themselves_and_what_lies_below(lists):
    urls = {
        "http://bad.com": "bad.com", "https://a.b.bad.com:8080/x?y#z": "bad.com",
        "HTTP://BAD.COM./": "bad.com", "//bad.com/x": "bad.com", "bad.com/x": "bad.com",
        "http://user@worse.org/": "worse.org", "http://sub.evil.net": "evil.net",
        "http://notbad.com": None, "http://bad.com.au": None, "http://com": None,
        "http://good.org/bad.com": None, "http://0.0.0.0": None,
    }  # fmt: skip
    rows = values(BlockedDomains((lists[0],)), [examined(url=url) for url in urls]).to_pylist()
    assert [row["domain"] for row in rows] == list(urls.values())
    assert [row["blocked"] for row in rows] == [int(domain is not None) for domain in urls.values()]
    none = values(BlockedDomains((lists[0],)), [examined(), examined(url="http://[::1")])
    assert none.to_pylist() == [{"blocked": None, "domain": None}] * 2


def test_international_domains():
    domains = Domains.read(iter_file("bücher.example\nxn--mnchen-3ya.example\n"))
    hosts = [host_of(url) for url in ("http://www.BÜCHER.example/", "http://münchen.example")]
    assert domains.match(hosts) == ["xn--bcher-kva.example", "xn--mnchen-3ya.example"]


def iter_file(text: str | bytes):
    import io

    return io.BytesIO(text.encode() if isinstance(text, str) else text)


LABEL = st.text(st.sampled_from("abc-1"), min_size=1, max_size=4)
DOMAIN = st.lists(LABEL, min_size=1, max_size=5).map(".".join)


@given(st.lists(DOMAIN, max_size=30), st.lists(DOMAIN, max_size=10), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_domains_match_like_a_plain_set(listed, hosts, chunk):
    blocklists._CHUNK, before = chunk, blocklists._CHUNK
    try:
        domains = Domains.read(iter_file("\r\n".join(listed)))
    finally:
        blocklists._CHUNK = before
    assert len(domains) == len(set(listed))
    assert domains.hashes.nbytes == 8 * len(domains)

    def expected(host):
        labels = host.split(".")
        below = [".".join(labels[i:]) for i in range(len(labels))]
        return next((name for name in below if name in set(listed)), None)

    assert domains.match(hosts) == [expected(host) for host in hosts]


def test_long_domains_and_many():
    listed = [f"{'x' * (i % 60)}{i}.example{i % 7}.com" for i in range(50_000)]
    domains = Domains.read(iter_file("\n".join(listed)))
    assert len(domains) == 50_000
    assert domains.match(listed[::97]) == listed[::97]
    assert domains.match(["y" + name for name in listed[::97]]) == [None] * len(listed[::97])


@pytest.mark.parametrize(
    "text, message",
    [
        ("good.com\n\n# x\n||ads.com^\n", r"line 4: '\|\|ads.com\^' is not a domain"),
        ("a.com\nhttp://b.com/x\n", "line 2"),
        ("." + "a" * 300, "line 1"),
        ("a..\nb\n*\n", "line 3"),
        (b"# x\ncaf\xe9.com\n", "line 2: .* is not a domain"),
    ],
)
def test_what_is_no_domain_is_told(tmp_path, text, message):
    path = tmp_path / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        BlockedDomains((str(path),)).setup()
    assert "\n" not in str(error.value) and "list.txt" in str(error.value)


# Words


def test_words_match_at_the_boundaries_of_tokens(lists):
    cases = {
        "Kiss my ass!": (1, "ass"), "a class of glasses": (0, None),
        "ASS, ass and a.s.s": (2, "ass"),
        "get free\n  money now": (1, "free money"), "free moneys": (0, None),
        "这里有赌博网站": (1, "赌博"), "中文ass中文": (1, "ass"), "ass_1": (0, None), "": (0, None),
    }  # fmt: skip
    rows = values(BlockedWords((lists[1],)), [examined(text) for text in cases]).to_pylist()
    assert [(row["count"], row["first"]) for row in rows] == list(cases.values())
    assert rows[0]["share"] == pytest.approx(1 / 3)
    assert rows[3]["share"] == pytest.approx(2 / 4)
    assert rows[5]["share"] == pytest.approx(2 / 7)
    assert math.isnan(rows[-1]["share"])


def test_words_inside_longer_entries_count_once():
    found = Phrases(["hot", "hot dog", "dog show", "cat"]).search("A hot dog show, hot!")
    assert (found.occurrences, found.distinct, found.words, found.first) == (3, 3, 5, "hot dog")


WORDS = st.lists(st.sampled_from(["ab", "a", "b c", "c", "好", "好人", "a好", "é", "#1", "b_"]),
                 min_size=1, max_size=6)  # fmt: skip
TEXT = st.lists(st.sampled_from(["ab", "a", "b", "c", "好", "人", "É", "#1", "_", " ", " ", "\n",
                                 "-"]), max_size=30).map("".join)  # fmt: skip


@given(WORDS, TEXT)
@settings(max_examples=300, deadline=None)
def test_words_match_like_plain_search(entries, text):
    spelling = " ".join(text.lower().split())

    def bound(before: str, after: str) -> bool:
        """No word goes on from one to the other."""
        return not (wordlike(before) and wordlike(after))

    def wordlike(c: str) -> bool:
        return bool(c) and (c.isalnum() or c == "_") and not "\u4e00" <= c <= "\u9fff"

    spans = {
        (at, at + len(entry), entry)
        for entry in entries
        for at in range(len(spelling))
        if spelling.startswith(entry, at)
        and bound(spelling[at - 1 : at], entry[0])
        and bound(entry[-1], spelling[at + len(entry) : at + len(entry) + 1])
    }
    outer = {
        one for one in spans
        if not any(o != one and o[0] <= one[0] and one[1] <= o[1] for o in spans)
    }  # fmt: skip
    found = Phrases(entries).search(text)
    assert found.occurrences == len(outer)
    assert found.distinct == len({entry for _, _, entry in outer})
    assert found.first == (min(outer)[2] if outer else None)


def test_wrong_lists_are_told_in_one_line(tmp_path, lists):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("# nothing\n")
    latin.write_bytes(b"good\ncaf\xe9\n")
    for kind in (BlockedDomains, BlockedWords):
        with pytest.raises(UserError, match=r"cannot read the block list .*none\.txt") as error:
            kind((str(tmp_path / "none.txt"),))
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="as a tuple of paths"):
            kind(())
        with pytest.raises(UserError, match="has changed since"):
            kind((lists[0],), digest="0")
    with pytest.raises(UserError, match=r"empty\.txt: it has no entries"):
        BlockedWords((str(empty),)).setup()
    with pytest.raises(UserError, match=r"latin\.txt, line 2 is not UTF-8"):
        BlockedWords((str(latin),)).setup()


def test_the_settings_follow_the_content_of_the_lists(tmp_path, lists):
    first = BlockedWords((lists[1],))
    second = tmp_path / "second.txt"
    second.write_text("other\n")
    both = BlockedWords((lists[1], str(second)))
    assert len({first.digest, both.digest, BlockedWords((str(second),)).digest}) == 3
    assert values(both, [examined("other ass")])["count"].to_pylist() == [2]
    second.write_text("changed\n")
    changed = BlockedWords((lists[1], str(second)))
    assert changed.digest != both.digest


@pytest.mark.parametrize("kind", [BlockedDomains, BlockedWords])
def test_a_worker_notices_a_list_that_changed(tmp_path, kind):
    path = tmp_path / "list.txt"
    path.write_text("one.com\n")
    attribute = kind((str(path),))
    path.write_text("two.com\n")
    with pytest.raises(UserError, match="has changed since the job was started"):
        attribute.setup()


def test_domain_lists_are_loaded_once(lists, monkeypatch):
    from data_beam.attributes import safety

    safety._domains.cache_clear()
    loads = []
    read = Domains.read
    monkeypatch.setattr(Domains, "read", lambda *args: loads.append(1) or read(*args))
    for _ in range(3):
        copy = pickle.loads(pickle.dumps(BlockedDomains((lists[0],))))
        values(copy, [examined(url="http://bad.com")])
    assert len(loads) == 1


# Personal data


def test_personal_data_is_found_and_cut():
    text = (
        "Write to jane.doe+x@mail.example.com or 联系me@例子.cn joe@example.org今天. "
        "From 8.8.8.8, 192.168.1.1, 300.1.1.1, v1.2.3 and 2001:4860:4860::8888; std::sort, 12:30. "
        "Call +49 30 1234567, (412) 268-7395, 412-268-7395 or 13912345678; not 2024-01-02 or 123."
    )
    row = values(PersonalData(), [examined(text)]).to_pylist()[0]
    assert (row["emails"], row["ips"], row["phones"]) == (2, 2, 4)
    removed = row["removed"]
    cut = [text[a:b] for a, b in zip(removed[::2], removed[1::2], strict=True)]
    assert cut == ["jane.doe+x@mail.example.com", "joe@example.org", "8.8.8.8",
                   "2001:4860:4860::8888"]  # fmt: skip
    phones = values(PersonalData(cut=("phone",)), [examined(text)]).to_pylist()[0]["removed"]
    assert [text[a:b] for a, b in zip(phones[::2], phones[1::2], strict=True)] == [
        "+49 30 1234567", "(412) 268-7395", "412-268-7395", "13912345678"
    ]  # fmt: skip
    with pytest.raises(UserError, match="cannot cut 'name'"):
        PersonalData(cut=("name",))


@pytest.mark.parametrize("unit", ["a", "1.", "1 ", "@a.", "+1", "a:", "2001:", "a@a", "1-"])
def test_personal_data_takes_linear_time(unit):
    import time

    def seconds(length: int) -> float:
        batch = [examined(unit * (length // len(unit)))]
        start = time.process_time()
        PersonalData().compute(batch)
        return time.process_time() - start

    seconds(1000)
    assert seconds(400_000) < 0.05 + 60 * max(seconds(20_000), 0.001)


def test_numbers_are_numpy_free(attributes):
    for attribute in attributes:
        for column in attribute.compute([examined(ENGLISH, url="http://bad.com")]).values():
            assert not any(isinstance(value, np.generic) for value in column)
