"""seqio reads what grain reads: the same tokens in the same order.

seqio and TensorFlow are an extra (`pip install internlm2-jax[seqio]`); without it these tests are
skipped, except the one that says so in one line.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_beam import cache
from data_beam.io import writers
from data_beam.schema import Document
from internlm2_jax.data.manifest import TokenReader, TokenSource
from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.tokenizer import Tokenizer, train_tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_json, write_json

MISSING = importlib.util.find_spec("seqio") is None
needs_seqio = pytest.mark.skipif(MISSING, reason="needs the seqio extra: TensorFlow and seqio")
SHARDS = {
    ("train", "code"): (70, 40), ("train", "web-text"): (30,), ("validation", "code"): (5,),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, vocabulary_file):
    """A corpus of two sources and its tokens, in records small enough that each shard has many."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for (split, source), counts in SHARDS.items():
        for shard, count in enumerate(counts):
            name = writers.shard_name(split, source, shard, len(counts))
            texts = [
                f"{split} {source} {n}: naïve 中文 <|im_end|> " + "word " * (n % 29)
                for n in range(count)
            ]
            if split == "train":
                texts[3] = ""  # has no tokens
            records = [
                Document(f"{n:032x}", text, source).to_bytes() for n, text in enumerate(texts)
            ]
            writers.write_array_record(folder / name, records, writers.DOCUMENTS_OPTIONS)
            rows.append({"name": name, "split": split, "source": source, "documents": count,
                         "bytes": sum(map(len, texts))})  # fmt: skip
    write_json(folder / "manifest.json", {"kind": "corpus", "shards": rows})
    cache.run(folder, vocabulary_file, folder / "tokens", tokens_per_record=500, max_dead_share=0.1)
    return folder


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    texts = [p.read_text() for p in sorted(Path(cache.__file__).parent.glob("*.py"))]
    path = tmp_path_factory.mktemp("model") / "t.model"
    train_tokenizer(texts, path, vocab_size=600)
    return path


@pytest.fixture
def tasks():
    import seqio

    from data_beam import tasks

    yield tasks
    seqio.TaskRegistry.reset()
    seqio.MixtureRegistry.reset()


def read(task, **options) -> list[list[int]]:
    options = {"split": "train", "shuffle": False, **options}
    return [row["targets"].tolist() for row in task.get_dataset(**options).as_numpy_iterator()]


@pytest.mark.skipif(not MISSING, reason="the seqio extra is installed")
def test_without_the_extra_one_line_says_how_to_get_it():
    with pytest.raises(UserError, match=r"pip install 'internlm2-jax\[seqio\]'") as error:
        importlib.import_module("data_beam.tasks")
    assert "\n" not in str(error.value)


def test_nothing_else_imports_it():
    code = (
        "import sys, data_beam.cache, data_beam.__main__, internlm2_jax.data.manifest\n"
        "sys.exit(bool({'data_beam.tasks', 'seqio', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@needs_seqio
def test_streams_are_equal(folders, tasks, vocabulary_file):
    import seqio

    tasks.register(folders / "tokens", name="t", tokenizer=vocabulary_file)
    tasks.register_corpus(folders, vocabulary_file, name="x")
    for split, source, task in (
        ("train", "code", "code"), ("train", "web-text", "web_text"),
        ("validation", "code", "code"),
    ):  # fmt: skip
        reader = TokenReader(folders / "tokens", split, source)
        wanted = [reader[i].tolist() for i in range(len(reader))]
        assert len(np.diff(reader.before[:, 0])) > 1 or split != "train"
        assert read(seqio.TaskRegistry.get(f"t_{task}"), split=split) == wanted
        assert read(seqio.TaskRegistry.get(f"x_{task}"), split=split) == wanted
        assert wanted == [d.tolist() for d in map(TokenSource(
            folders / "tokens", split, source).doc, range(len(reader)))]  # fmt: skip
    assert set(seqio.TaskRegistry.get("t_code").splits) == {"train", "validation"}
    assert seqio.TaskRegistry.get("t_web_text").splits == ("train",)
    texts = seqio.TaskRegistry.get("x_code").get_dataset(split="validation", shuffle=False)
    row = next(texts.as_numpy_iterator())
    assert row["id"].decode() == f"{0:032x}"
    assert row["targets_pretokenized"].decode().startswith("validation code 0: naïve")


@needs_seqio
def test_shards_and_shuffling_keep_every_document(folders, tasks):
    import seqio

    tasks.register(folders / "tokens", name="t")
    task = seqio.TaskRegistry.get("t_code")
    whole = read(task)
    halves = [read(task, shard_info=seqio.ShardInfo(i, 2)) for i in range(2)]
    assert halves[0] + halves[1] == whole and all(halves)
    thirds = [read(task, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]  # more than shards
    assert sorted([*thirds[0], *thirds[1], *thirds[2]]) == sorted(whole)
    shuffled = read(task, shuffle=True, seed=1)
    assert shuffled != whole and sorted(shuffled) == sorted(whole)
    assert shuffled == read(task, shuffle=True, seed=1)
    assert max(map(len, read(task, sequence_length={"targets": 9}))) == 9


@needs_seqio
def test_the_mixture_keeps_the_shares_of_tokens(folders, tasks, vocabulary_file):
    manifest = read_json(folders / "tokens" / "manifest.json")
    mixture = tasks.register(folders / "tokens", name="a")
    by_task = mixture.rate_per_task_name
    documents = {n: e["documents"] for n, e in manifest["splits"]["train"].items()}
    # The shares of the corpus itself: every document is seen as often.
    assert by_task["a_code"] / by_task["a_web_text"] == pytest.approx(
        documents["code"] / documents["web-text"]
    )
    mixture = tasks.register(folders / "tokens", name="b", rates={"code": 1, "web-text": 3})
    rows = mixture.get_dataset(split="train", shuffle=False, num_epochs=None).take(3000)
    code = {tuple(row) for row in read_all(folders, "code")}
    counts = {True: 0, False: 0}
    for row in rows.as_numpy_iterator():
        counts[tuple(row["targets"].tolist()) in code] += len(row["targets"])
    assert counts[False] / sum(counts.values()) == pytest.approx(0.75, abs=0.04)
    only = tasks.register(folders / "tokens", name="c", rates={"code": 1})
    assert set(only.rate_per_task_name) == {"c_code"}
    text = tasks.register_corpus(folders, vocabulary_file, name="d", rates={"code": 1})
    assert set(text.rate_per_task_name) == {"d_code"}


@needs_seqio
def test_the_mixture_gives_each_source_in_the_order_that_training_reads(folders, tasks):
    mixture = tasks.register(folders / "tokens", name="m", rates={"code": 1, "web-text": 2})
    rows = mixture.get_dataset(split="train", shuffle=False, num_epochs=None).take(1500)
    streams = {source: read_all(folders, source) for source in ("code", "web-text")}
    owner = {tuple(doc): source for source, docs in streams.items() for doc in docs}
    found = {source: [] for source in streams}
    for row in rows.as_numpy_iterator():
        document = row["targets"].tolist()
        found[owner[tuple(document)]].append(document)
    for source, documents in found.items():
        epochs = -(-len(documents) // len(streams[source]))
        assert epochs >= 2
        assert documents == (streams[source] * epochs)[: len(documents)]


def read_all(folders, source):
    reader = TokenReader(folders / "tokens", "train", source)
    return [reader[i].tolist() for i in range(len(reader))]


@needs_seqio
def test_the_vocabulary_keeps_control_tokens(tasks, vocabulary, vocabulary_file, folders):
    import seqio
    import tensorflow as tf

    loaded = Tokenizer.load(vocabulary_file)
    mine = tasks.Vocabulary(vocabulary)
    text = "naïve 中文 😀 <|im_end|>"
    ids = mine.encode(text)
    assert ids == vocabulary.encode(text) and vocabulary.im_end_id not in ids
    assert mine.decode(ids) == text
    turn = [vocabulary.bos_id, *ids, vocabulary.im_end_id, vocabulary.eos_id, *ids]
    assert mine.decode(turn) == f"<s>{text}<|im_end|></s>"
    assert mine.encode_tf(tf.constant(text)).numpy().tolist() == ids
    padded = tf.constant([[*ids, 0, 0], [vocabulary.im_end_id] * (len(ids) + 2)])
    assert [t.decode() for t in mine.decode_tf(padded).numpy()] == [
        text, "<|im_end|>" * (len(ids) + 2)
    ]  # fmt: skip
    assert (mine.vocab_size, mine.bos_id, mine.eos_id) == (vocabulary.vocab_size, 1, 2)
    assert mine == tasks.Vocabulary(vocabulary) != tasks.Vocabulary(loaded)
    tasks.register(folders / "tokens", name="t", tokenizer=loaded)
    feature = seqio.TaskRegistry.get("t_code").output_features["targets"]
    text = feature.vocabulary.decode(read(seqio.TaskRegistry.get("t_code"))[0])
    assert text == "<s>train code 0: naïve 中文 <|im_end|> </s>"


@needs_seqio
def test_mistakes_are_one_line(tasks, folders, vocabulary):
    tasks.register(folders / "tokens", name="t")
    for call, match in (
        (lambda: tasks.register(folders / "tokens", name="t"), "already; choose another name"),
        (lambda: tasks.register(folders / "tokens", name="u", tokenizer=vocabulary),
         "was tokenized with another tokenizer"),
        (lambda: tasks.register(folders / "tokens", name="v", rates={"books": 1}),
         "rates name the source 'books'; there are code, web-text"),
        (lambda: tasks.register(folders / "tokens", name="w", rates={"code": 0}), "a rate above 0"),
        (lambda: tasks.register(folders / "absent", name="y"), "does not exist"),
        (lambda: tasks.register_corpus(folders / "tokens", vocabulary), "does not describe a corp"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


@needs_seqio
def test_rows_are_those_that_training_reads(folders, tasks):
    """Packed, mixed and shuffled: the same arrays in the same order."""
    sources = {
        source: PackedSource(TokenSource(folders / "tokens", "train", source), 64)
        for source in ("code", "web-text")
    }
    batches = Batches(sources, {"code": 3, "web-text": 1}, batch_size=4, seed=7, ramp=[(2, 2)])
    mixture = tasks.register_rows(batches, 6, vocab_size=600, name="rows")
    found = list(
        mixture.get_dataset(split="train", shuffle=False, num_epochs=1).as_numpy_iterator()
    )
    wanted = [
        {name: column[row] for name, column in batches(step).items() if name != "source"}
        for step in range(6)
        for row in range(batches.size(step))
    ]
    assert len(found) == len(wanted) == 2 * 2 + 4 * 4
    for ours, theirs in zip(wanted, found, strict=True):
        assert ours.keys() == theirs.keys()
        for name, column in ours.items():
            np.testing.assert_array_equal(column, theirs[name], err_msg=name)
    with pytest.raises(UserError, match="rows already; choose another name"):
        tasks.register_rows(batches, 6, vocab_size=600, name="rows")


@needs_seqio
def test_conversations_are_read_from_a_task_of_texts():
    """The reader of data/conversations.py, against the real seqio."""
    import seqio
    import tensorflow as tf

    from internlm2_jax.data import conversations

    def examples(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": ["2 + 2?", "x"], "targets": ["4", ""]})

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    seqio.TaskRegistry.add(
        "conversation_sums",
        source=seqio.FunctionDataSource(examples, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[],
    )
    rows, bad = conversations.read(["seqio:conversation_sums"])
    assert [m["content"] for m in rows[0]["messages"]] == ["2 + 2?", "4"]
    assert str(bad[0]) == "seqio:conversation_sums:2: messages[1] is an empty answer"
