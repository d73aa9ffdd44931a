"""The project's corpora as seqio Tasks and Mixtures, over the very files that grain reads.

    from data_beam import tasks
    tasks.register("tokens", name="internlm2", tokenizer="tokenizer.model")
    seqio.get_mixture_or_task("internlm2").get_dataset(split="train", shuffle=False)

`register` takes a folder of tokens, `register_corpus` a folder of text; both give one Task per
source, with the splits that the source has, and a Mixture of them all. `register_rows` gives what
a training run reads, row for row. Unshuffled, a Task gives
the documents in the order of the shards, as `TokenReader` does. Nothing else imports this module:
seqio imports TensorFlow, which neither training nor the Beam workers need.

seqio pads with id 0, which is <unk> here and never stands in a text (bytes spell what has no
piece); it samples documents where a manifest's rates speak of tokens, hence the division by the
mean length.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_beam.io import corpus_folder, writers
from data_beam.schema import Document
from internlm2_jax.data.manifest import TokenReader, read_manifest
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError

try:
    import seqio
    import tensorflow as tf
except ImportError as error:
    raise UserError(
        f"the seqio extra is not installed ({error}): pip install 'internlm2-jax[seqio]'"
    ) from error

FEATURE = "targets"
ROW = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


class Vocabulary(seqio.Vocabulary):
    """The project's tokenizer for seqio. Decoding spells special tokens by their names instead of
    leaving them out ("<s>", "<|im_end|>"); encoding never makes one out of text."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def bos_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> None:
        """There is none: every text can be spelt in bytes."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.show(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:  # an array when run eagerly
            data = text if isinstance(text, bytes) else text.item()
            return np.array(self.tokenizer.encode(data.decode()), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Texts [...] of ids [..., T]; the padding at the end of a row is left out."""

        def decode(rows: np.ndarray) -> np.ndarray:
            flat = rows.reshape(-1, rows.shape[-1])
            texts = [self.tokenizer.show(np.trim_zeros(row, "b").tolist()) for row in flat]
            return np.array([text.encode() for text in texts], object).reshape(rows.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        texts.set_shape(ids.shape[:-1])
        return texts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.tokenizer.sha256 == self.tokenizer.sha256

    def __hash__(self) -> int:
        return hash(self.tokenizer.sha256)


class ShardedSource(seqio.DataSource):
    """A seqio source over the shards of our folders: what `open(split, shards)` gives, in order.

    Unlike seqio's FunctionDataSource it can be split by shards between hosts; shuffled, it takes
    the shards in another order (a Task then shuffles documents in a buffer).
    """

    def __init__(
        self,
        open: Callable[[str, Sequence[str]], tf.data.Dataset],
        shards: Mapping[str, Sequence[str]],
        documents: Mapping[str, int],
    ):
        super().__init__(splits=list(shards), num_input_examples=documents)
        self._open, self._shards = open, shards

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return list(self._shards[split])

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_: Any,
    ) -> tf.data.Dataset:
        shards = self.list_shards(split)
        if shard_info is not None and shard_info.num_shards > 1:
            shards = shards[shard_info.index :: shard_info.num_shards]
        if shuffle:
            np.random.default_rng(seed).shuffle(shards)
        return self._open(split, shards)


def register(
    tokens: str | os.PathLike,
    *,
    name: str = "internlm2",
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    rates: Mapping[str, float] | None = None,
) -> seqio.Mixture:
    """Registers the Tasks NAME_SOURCE and the Mixture NAME over a folder of tokens.

    Examples are {"targets": [bos ... eos] int32}. With `tokenizer` (a .model file or a loaded one)
    predictions can be decoded; it must be the one the tokens were made with. `rates` are the
    sources' shares of the tokens, by default the manifest's.
    """
    folder = Path(tokens)
    loaded = Tokenizer.load(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else tokenizer
    manifest = read_manifest(folder, tokenizer_sha256=loaded.sha256 if loaded else None)
    vocabulary = (
        Vocabulary(loaded) if loaded else seqio.PassThroughVocabulary(size=manifest["vocab_size"])
    )
    entries = _by_source(manifest["splits"])
    sources = {
        source: ShardedSource(
            functools.partial(_token_dataset, folder, source),
            {split: entry["shards"] for split, entry in splits.items()},
            {split: entry["documents"] for split, entry in splits.items()},
        )
        for source, splits in entries.items()
    }
    shares = rates or manifest.get("rates", {}).get("train") or {
        source: splits["train"]["tokens"] for source, splits in entries.items() if "train" in splits
    }  # fmt: skip
    lengths = {
        source: splits["train"]["tokens"] / splits["train"]["documents"]
        for source, splits in entries.items()
        if "train" in splits and splits["train"]["documents"]
    }
    return _register(name, sources, vocabulary, [], shares, lengths)


def register_corpus(
    corpus: str | os.PathLike,
    tokenizer: str | os.PathLike | Tokenizer,
    *,
    name: str = "internlm2_text",
    rates: Mapping[str, float] | None = None,
) -> seqio.Mixture:
    """Registers the Tasks NAME_SOURCE and the Mixture NAME over a folder of documents, tokenized on
    the way: the same token sequences in the same order as `register` gives after the tokenize job.

    Examples also have "id", "targets_pretokenized". `rates` are the sources' shares of the bytes of
    text, by default as many documents as there are.
    """
    folder = Path(corpus)
    loaded = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    manifest = corpus_folder.read_manifest(folder)
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for row in manifest["shards"]:
        splits = entries.setdefault(row["source"], {})
        entry = splits.setdefault(row["split"], {"shards": [], "documents": 0, "bytes": 0})
        entry["shards"].append(row["name"])
        entry["documents"] += row["documents"]
        entry["bytes"] += row.get("bytes", 0)
    sources = {
        source: ShardedSource(
            functools.partial(_text_dataset, folder),
            {split: entry["shards"] for split, entry in splits.items()},
            {split: entry["documents"] for split, entry in splits.items()},
        )
        for source, splits in entries.items()
    }
    trained = {source: splits["train"] for source, splits in entries.items() if "train" in splits}
    if rates is None:
        shares = {source: float(entry["documents"]) for source, entry in trained.items()}
        lengths = dict.fromkeys(trained, 1.0)
    else:
        shares = dict(rates)
        lengths = {s: e["bytes"] / max(e["documents"], 1) or 1.0 for s, e in trained.items()}
    steps = [seqio.preprocessors.tokenize, _add_bos, seqio.preprocessors.append_eos]
    return _register(name, sources, Vocabulary(loaded), steps, shares, lengths)


def register_rows(
    batches: Batches, steps: int, vocab_size: int, *, name: str = "internlm2_rows"
) -> seqio.Mixture:
    """Registers a Task NAME_train and the Mixture NAME over the rows of a training run.

    Examples are the rows of `batches(0)`, `batches(1)`, ... up to `steps`, one after another,
    packed, mixed and shuffled as training has them: {"tokens", "targets", "segment_ids",
    "positions": [T] int32, "loss_mask": [T] float32}. Read it with shuffle=False and
    num_epochs=1 (seqio repeats a Mixture for ever); the only split is train.
    """
    dtypes = {**dict.fromkeys(ROW, tf.int32), "loss_mask": tf.float32}
    length = batches(0)[FEATURE].shape[1]

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for step in range(steps):
            batch = batches(step)
            for row in range(batches.size(step)):
                yield {feature: batch[feature][row] for feature in ROW}

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
        signature = {feature: tf.TensorSpec([length], dtypes[feature]) for feature in ROW}
        return tf.data.Dataset.from_generator(rows, output_signature=signature)

    vocabulary = seqio.PassThroughVocabulary(size=vocab_size)
    task = f"{name}_train"
    _check_names(name, [task])
    seqio.TaskRegistry.add(
        task,
        source=seqio.FunctionDataSource(
            dataset_fn=dataset,
            splits=["train"],
            num_input_examples={"train": sum(batches.size(step) for step in range(steps))},
        ),
        output_features={
            feature: seqio.Feature(vocabulary, add_eos=False, dtype=dtype, rank=1)
            for feature, dtype in dtypes.items()
        },
        preprocessors=[],
    )
    return seqio.MixtureRegistry.add(name, [(task, 1.0)])


def _by_source(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for split, sources in splits.items():
        for source, entry in sources.items():
            entries.setdefault(source, {})[split] = entry
    return entries


def _register(
    name: str,
    sources: Mapping[str, ShardedSource],
    vocabulary: seqio.Vocabulary,
    preprocessors: Sequence[Callable],
    shares: Mapping[str, float],
    lengths: Mapping[str, float],
) -> seqio.Mixture:
    """`shares` of a quantity of which a document of a source has `lengths` on average."""
    if unknown := sorted(shares.keys() - sources.keys()):
        raise UserError(
            f"rates name the source {unknown[0]!r}; there are {', '.join(sorted(sources))}"
        )
    names = {source: re.sub(r"[^\w.:]", "_", f"{name}_{source}") for source in sorted(sources)}
    _check_names(name, names.values())
    mixed = [
        (names[source], shares[source] / lengths[source])
        for source in names
        if shares.get(source) and source in lengths
    ]
    if not mixed:
        raise UserError(f"no source of {name} has documents to train on and a rate above 0")
    text = bool(preprocessors)
    for source, task in names.items():
        seqio.TaskRegistry.add(
            task,
            source=sources[source],
            output_features={
                FEATURE: seqio.Feature(vocabulary, add_eos=text, dtype=tf.int32, rank=1)
            },
            preprocessors=list(preprocessors),
        )
    return seqio.MixtureRegistry.add(name, mixed)


def _check_names(mixture: str, tasks: Iterable[str]) -> None:
    taken = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} & {mixture, *tasks}
    if taken:
        raise UserError(f"seqio has a Task or Mixture {min(taken)} already; choose another name")


def _token_dataset(folder: Path, source: str, split: str, shards: Sequence[str]) -> tf.data.Dataset:
    """Documents of some shards. Whole records cross into TensorFlow: many documents a call."""

    def records() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for shard in shards:
            for lengths, tokens in TokenReader(folder, split, source, shards=[shard]).records():
                yield lengths, tokens.astype(np.int32)

    signature = (tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int32))
    dataset = tf.data.Dataset.from_generator(records, output_signature=signature)
    return dataset.flat_map(
        lambda lengths, tokens: tf.data.Dataset.from_tensor_slices(
            tf.RaggedTensor.from_row_lengths(tokens, lengths, validate=False)
        )
    ).map(lambda tokens: {FEATURE: tf.ensure_shape(tokens, [None])})


def _text_dataset(folder: Path, split: str, shards: Sequence[str]) -> tf.data.Dataset:
    def documents() -> Iterator[dict[str, str]]:
        for shard in shards:
            for record in writers.iter_array_record(folder / shard):
                document = Document.from_bytes(record)
                if document.text:  # the tokenize job has no tokens for an empty one either
                    yield {"id": document.id, FEATURE: document.text}

    signature = {key: tf.TensorSpec([], tf.string) for key in ("id", FEATURE)}
    return tf.data.Dataset.from_generator(documents, output_signature=signature)


def _add_bos(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]):
    bos = output_features[FEATURE].vocabulary.bos_id
    return dataset.map(lambda row: {**row, FEATURE: tf.concat([[bos], row[FEATURE]], axis=0)})
