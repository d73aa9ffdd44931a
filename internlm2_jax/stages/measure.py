"""What an arm of an ablation is worth: on held-out text, on tasks, in memory and in speed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax import files
from internlm2_jax.data import documents
from internlm2_jax.data.mixture import encode
from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import first_batches
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.evals.perplexity import bits_per_byte
from internlm2_jax.evals.verifiable import answer_loss, completion_accuracy
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer.engine import Engine
from internlm2_jax.infer.requests import Request
from internlm2_jax.infer.sizes import EngineConfig
from internlm2_jax.train.checkpoint import load_model
from internlm2_jax.train.objectives import evaluate_loss

CHINESE = "chinese"
_CHINESE_SHARE = 0.3  # of the characters of a document


def measure(
    folder: Path,
    *,
    model: Path | str,
    tokenizer: Path | str,
    corpus: Path | str,
    arm: str,
    funnel: Path | str | None = None,
    max_tokens: int = 65536,
    row_length: int = 0,
    by_script: bool = False,
    tasks: int = 0,
    decode: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> None:
    """Leaves result.json: {"arm", "measures": {name: number}} in `folder`.

    Args:
        corpus: a corpus folder whose validation split all arms are measured on. For each source,
            and for all: "loss" in nats per token, "bits_per_byte" and "bytes_per_token", which
            compare models of different tokenizers.
        by_script: Chinese documents and others instead of sources.
        funnel: a corpus folder, of which the share that each step dropped is noted.
        max_tokens: of a source; row_length: default the model's own.
        tasks: held-out verifiable tasks to complete, if any: the share right, and the loss of right
            answers in nats per token.
        decode: (rows, prompt, new tokens) to time the engine with, if any.
    """
    vocabulary = Tokenizer.load(Path(tokenizer) / "tokenizer.model")
    network, params = load_model(Path(model))
    length = row_length or network.cfg.max_position_embeddings
    groups = _groups(documents.read(Path(corpus) / "corpus", "validation"), by_script)
    loss_of = evaluate_loss(network)
    measures: dict[str, float] = {"num_params": network.cfg.num_params()}
    sums = np.zeros(3)  # nats, predicted tokens, bytes
    for name, texts in sorted(groups.items()):
        encoded = encode(texts, vocabulary)
        predicted = len(encoded.tokens) - len(texts)
        num_bytes = sum(len(text.encode()) for text in texts)
        loss = loss_of(params, first_batches(PackedSource(encoded, length), max_tokens))
        sums += [loss * predicted, predicted, num_bytes]
        measures |= _of_text(f"/{name}", loss, predicted, num_bytes)
    measures |= _of_text("", sums[0] / sums[1], sums[1], sums[2])
    if funnel is not None:
        measures |= _funnel(Path(funnel) / "corpus" / "funnel.json")
    if tasks:
        right = completion_accuracy(network, params, vocabulary, num_tasks=tasks, seed=seed)
        measures["task_accuracy"] = right["all"]
        measures["task_answer_loss"] = answer_loss(
            network, params, vocabulary, num_tasks=tasks, seed=seed
        )
    if decode is not None:
        measures |= _speed(network, params, *decode, seed)
    files.write_json(folder / "result.json", {"arm": arm, "measures": measures})


def _groups(found: Iterable[documents.TextDocument], by_script: bool) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for document in found:
        name = document.source
        if by_script:
            name = CHINESE if _chinese(document.text) >= _CHINESE_SHARE else "other"
        groups.setdefault(name, []).append(document.text)
    if not groups:
        raise UserError("there is no document in the validation split to measure on")
    if by_script and CHINESE not in groups:
        raise UserError(
            "the validation split has no Chinese document; give a folder with some: --corpus DIR"
        )
    return groups


def _chinese(text: str) -> float:
    return sum("\u4e00" <= c <= "\u9fff" for c in text) / max(len(text), 1)


def _of_text(suffix: str, loss: float, predicted: float, num_bytes: float) -> dict[str, float]:
    return {
        f"loss{suffix}": float(loss),
        f"bits_per_byte{suffix}": bits_per_byte(float(loss), int(predicted), int(num_bytes)),
        f"bytes_per_token{suffix}": float(num_bytes / predicted),
    }


def _funnel(path: Path) -> dict[str, float]:
    """The share of the bytes that each step has dropped of what came to it, and what is left."""
    stages: Sequence[Mapping[str, Any]] = files.read_json(path)["stages"]
    rows = [row for row in stages if row["stage"] not in ("select", "read") and row["bytes_in"]]
    shares = {f"dropped/{r['stage']}": 1 - r["bytes_out"] / r["bytes_in"] for r in rows}
    return {**shares, "kept_bytes": float(stages[-1]["bytes_out"])}


def _speed(
    network: Any, params: Any, rows: int, prompt: int, new: int, seed: int
) -> dict[str, float]:
    """Bytes of cache a token, and tokens a second of the fastest of three batches, compiled."""
    config = EngineConfig(
        slots=rows, max_length=prompt + new, prefill=((rows, prompt),), steps=min(new, 64)
    )
    engine = Engine(network, params, config)
    rng = np.random.default_rng(seed)

    def run() -> float:
        ids = rng.integers(3, network.cfg.vocab_size, (rows, prompt)).tolist()
        before = time.perf_counter()
        found = engine.run([Request(row, new, row=i) for i, row in enumerate(ids)])
        return sum(len(r.tokens) for r in found) / (time.perf_counter() - before)

    run(), run()  # the second meets arrays that a program made, and may compile again
    return {
        "cache_bytes_per_token": kv.bytes_per_token(network.cfg),
        "decode_tokens_per_second": max(run() for _ in range(3)),
    }
