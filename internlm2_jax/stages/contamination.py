"""Losses on train, test and reference sets, and what of them stands in a corpus (report, 5.4)."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internlm2_jax import files
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.evals.contamination import SPLITS, Overlap, describe, judge
from internlm2_jax.infer.cache import bucket
from internlm2_jax.kernels.cross_entropy import linear_logprobs
from internlm2_jax.progress import Progress
from internlm2_jax.train.checkpoint import load_model

log = logging.getLogger(__name__)
_BATCH_TOKENS = 2**14
_SAMPLES = 20
_DOCUMENTS = 64


def contamination(
    folder: Path,
    *,
    model: Path | str,
    tokenizer: Path | str,
    train: Path | str,
    test: Path | str,
    reference: Path | str,
    baseline: Path | str | None = None,
    corpus: Path | str | None = None,
    margin: float = 0.05,
    confidence: float = 0.999,
    limit: int | None = None,
    arm: str = "",
    seed: int = 0,
) -> None:
    """Leaves result.json, and the loss of every example in losses.jsonl, in `folder`.

    Args:
        model, baseline: folders of stages; the baseline is a model known to be clean, if any, that
            reads the same tokenizer.
        train, test, reference: files or folders of examples (data_beam/contamination/benchmarks.py
            says which); a text is "question answer", as in the report.
        corpus: a folder that data_beam wrote, searched for the examples by runs of 13 words.
        margin, confidence: see evals/contamination.py.
        limit: examples of a set, drawn by `seed`; default all.

    A loss is divided by all tokens of a text, <s> included, as OpenCompass does, whose numbers the
    report prints.
    """
    sets = {
        name: _examples(name, path, limit, seed)
        for name, path in zip(SPLITS, (train, test, reference), strict=True)
    }
    vocabulary = Tokenizer.load(Path(tokenizer) / "tokenizer.model")
    models = {"model": model} | ({"baseline": baseline} if baseline is not None else {})
    losses = _losses(folder / "losses.jsonl", models, vocabulary, sets)
    finding = judge(losses["model"], losses.get("baseline"), margin=margin, confidence=confidence)
    overlaps = {} if corpus is None else overlap(folder, Path(corpus), sets)
    for line in describe(finding, overlaps):
        log.info(line)
    files.write_json(
        folder / "result.json",
        {
            "arm": arm,
            "margin": margin,
            "confidence": confidence,
            **dataclasses.asdict(finding),
            "baseline": baseline is not None,
            "overlap": {
                name: {**dataclasses.asdict(o), "share": o.share} for name, o in overlaps.items()
            },
            "summary": describe(finding, overlaps),
        },
    )


def sample_losses(
    model: Any, params: Any, vocabulary: Tokenizer, texts: Sequence[str]
) -> Iterator[tuple[int, float]]:
    """(index, mean loss in nats per token) of each text, in batches of like length."""

    @jax.jit
    def sums(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, head = model.logit_factors(params, model.hidden(params, tokens[:, :-1]))
        logprobs = linear_logprobs(hidden, head, tokens[:, 1:])
        return -jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1)

    rows = [[vocabulary.bos_id, *ids] for ids in vocabulary.encode_batch(texts)]
    most = model.cfg.length_limit
    for i, row in enumerate(rows):
        if most is not None and len(row) > most:
            raise UserError(
                f"contamination: example {i} has {len(row)} tokens, more than the model's {most} "
                "positions; take it out, or a model of longer context"
            )
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for width, group in itertools.groupby(order, key=lambda i: bucket(len(rows[i]))):
        members = list(group)
        size = max(1, min(_BATCH_TOKENS // width, bucket(len(members), smallest=4)))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            tokens = np.full((size, width + 1), vocabulary.pad_id, np.int32)
            lengths = np.zeros(size, np.int64)
            for place, i in enumerate(chosen):
                tokens[place, : len(rows[i])], lengths[place] = rows[i], len(rows[i])
            mask = np.arange(width)[None] < lengths[:, None] - 1
            found = np.asarray(sums(params, tokens, mask))
            yield from zip(chosen, (found / np.maximum(lengths, 1)).tolist(), strict=False)


def overlap(folder: Path, corpus: Path, sets: Mapping[str, Any]) -> dict[str, Overlap]:
    """Which examples of each set stand in the documents of `corpus`, train and validation."""
    from data_beam.attributes.base import Examined
    from data_beam.attributes.contamination import Contamination
    from data_beam.contamination import index
    from data_beam.schema import Document
    from internlm2_jax.data import documents

    path = folder / "benchmarks.index"
    counts = {row["name"]: row for row in index.build(list(sets.values()), path)["sets"]}
    attribute = Contamination.of(str(path))
    inner = corpus / "corpus" if (corpus / "corpus").is_dir() else corpus
    texts = itertools.chain.from_iterable(
        documents.read(inner, split) for split in ("train", "validation")
    )
    found: dict[str, dict[str, Any]] = {name: {} for name in sets}
    with Progress("overlap", None, "document") as progress:
        while batch := list(itertools.islice(texts, _DOCUMENTS)):
            examined = [Examined(Document("", d.text, d.source)) for d in batch]
            columns = attribute.compute(examined)
            for document, ids, share in zip(
                batch, columns["examples"], columns["example_share"], strict=True
            ):
                for id in ids or ():
                    name = id.partition("#")[0].partition("/")[0]
                    where = {"example": id, "document": document.path, "most_of_one": share}
                    found[name].setdefault(id, where)
            progress.update(len(batch))
    return {
        name: Overlap(
            counts[name]["examples"],
            counts[name]["indexed"],
            len(hits),
            [hits[id] for id in sorted(hits)[:_SAMPLES]],
        )
        for name, hits in found.items()
    }


def _examples(name: str, path: Path | str, limit: int | None, seed: int) -> Any:
    """The evaluation set of a split."""
    from data_beam.contamination import benchmarks

    found = benchmarks.read(benchmarks.SetSpec(name, str(path), ()))
    if limit is None or len(found.examples) <= limit:
        return found
    chosen = np.random.default_rng(seed).permutation(len(found.examples))[:limit]
    return found._replace(examples=[found.examples[i] for i in sorted(chosen)])


def _text(example: Any) -> str:
    """Its first question and first answer."""
    return " ".join([example.questions[0], *example.answers[:1]])


def _losses(
    path: Path, models: Mapping[str, Any], vocabulary: Tokenizer, sets: Mapping[str, Any]
) -> dict[str, dict[str, list[float]]]:
    """{model: {split: losses}}; those in the file already are not computed again."""
    known: dict[tuple[str, str], float] = {}
    if path.is_file():
        lines = [x for x in path.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")]
        rows = [files.parse_json(x, f"{path}:{i}") for i, x in enumerate(lines, 1)]
        files.write_jsonl(path, rows)
        known = {(row["model"], row["example"]): row["loss"] for row in rows}
    examples = [example for some in sets.values() for example in some.examples]
    with files.explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("ab")
    with handle, Progress("losses", len(models) * len(examples), "example") as progress:
        for name, stage in models.items():
            left = [e for e in examples if (name, e.id) not in known]
            progress.update(len(examples) - len(left))
            if not left:
                continue
            found = sample_losses(*load_model(Path(stage)), vocabulary, [_text(e) for e in left])
            for i, loss in found:
                known[name, left[i].id] = loss
                row = {"model": name, "example": left[i].id, "loss": loss}
                with files.explain_disk_errors(path):
                    handle.write(files.json_bytes(row) + b"\n")
                progress.update(1, loss=loss)
    return {
        name: {split: [known[name, e.id] for e in some.examples] for split, some in sets.items()}
        for name in models
    }
