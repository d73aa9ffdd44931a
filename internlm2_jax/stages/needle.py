"""How far back can a checkpoint find a sentence? Lengths by depths, through the engine.

InternLM2 report, section 5.2.6; evals/needle.py has the protocol. Every answer is a line of
items.jsonl; a cell that is there is not asked again, so a killed run goes on at the next cell and
ends with the same numbers. Memory is bounded by `cache_bytes`: prompts are read a chunk at a time
into the engine's pages, and those that do not fit wait.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from internlm2_jax import files
from internlm2_jax.data import chat, documents
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.evals import needle as protocol
from internlm2_jax.evals.intervals import student
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer.engine import Engine
from internlm2_jax.infer.requests import Request
from internlm2_jax.infer.sizes import EngineConfig
from internlm2_jax.models.build import build
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.rope_scaling import DynamicNTK, PositionInterpolation, YaRN
from internlm2_jax.progress import Progress
from internlm2_jax.train.checkpoint import load_model

Rope = Literal["own", "none", "dynamic", "linear", "yarn"]
SCORES = tuple(protocol.GENERATION_SCORES)
_TOKENS_OF_PREFILL = 512


@dataclasses.dataclass(frozen=True)
class Series:
    """One heat map: needles in one language, so many in a text."""

    language: str = "en"
    num_needles: int = 1

    @property
    def name(self) -> str:
        many = "1 needle" if self.num_needles == 1 else f"{self.num_needles} needles"
        return f"{self.language}, {many}"


def needle(
    folder: Path,
    *,
    model: Path | str,
    tokenizer: Path | str,
    haystack: Path | str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0, 21, 42, 63, 84, 100),
    series: Sequence[Series] = (Series("en"), Series("zh")),
    repeats: int = 10,
    style: Literal["chat", "completion"] = "chat",
    rope: Rope = "own",
    rope_factor: float | None = None,
    max_new_tokens: int = 64,
    buffer: int | None = None,
    threshold: float = 0.85,
    score: str = "keyword",
    cache_bytes: int = 2**32,
    slots: int = 8,
    arm: str = "",
    seed: int = 0,
) -> None:
    """Scores every cell of lengths x depths; items.jsonl and result.json are left in `folder`.

    Args:
        model, tokenizer: folders of stages with a checkpoint and a tokenizer.model.
        haystack: a corpus folder (its validation split), or a folder of .txt files.
        lengths: tokens of the whole test, question and `buffer` for the answer included.
        series: languages and numbers of needles; see evals/needle_text.py.
        repeats: texts a cell; the report's protocol has 10.
        style: "chat" asks in ChatML, all needles at once; "completion" lets a base model go on from
            the opening words of each needle.
        rope: how rows longer than those trained on are rotated: as the checkpoint says ("own"), not
            otherwise than short ones ("none"), or by an option of models/rope_scaling.py, whose
            factor is `rope_factor` or else the longest length over the trained one (dynamic: 2.0).
        threshold: mean `score` that counts as found, for the effective length (RULER's is the score
            of Llama-2-7B at 4k, 85.6%; 0.85 is our choice).
        cache_bytes: the most that keys and values may take on all devices together.
        slots: texts that are answered together, where they fit.
    """
    protocol.check_score(score)
    if style not in ("chat", "completion"):
        raise UserError(f"needle: style is {style!r}; choose chat or completion")
    vocabulary = Tokenizer.load(Path(tokenizer) / "tokenizer.model")
    trained, params = load_model(Path(model))
    longest = max(lengths) + max_new_tokens
    cfg = stretched(trained.cfg, rope, longest, rope_factor)
    engine = Engine(
        build(cfg), params, _sizes(cfg, longest, cache_bytes, slots), tokenizer=vocabulary
    )
    texts = list(_texts(Path(haystack)))
    cells = [(s, length, depth) for s in series for length in lengths for depth in depths]
    path = folder / "items.jsonl"
    rows = _finished(path, repeats)
    done = {_cell(row) for row in rows}
    hay = [protocol.Haystack(vocabulary, texts, seed=seed + r) for r in range(repeats)]
    with files.explain_disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("ab")
    with handle, Progress("needle", total=len(cells), unit="cell") as progress:
        for s, length, depth in cells:
            if (s.name, length, depth) in done:
                progress.update(1)
                continue
            samples = [
                protocol.build_sample(
                    vocabulary, h, length, depth, language=s.language, index=seed + r,
                    num_needles=s.num_needles, buffer=buffer,
                )
                for r, h in enumerate(hay)
            ]  # fmt: skip
            answers = _answers(engine, vocabulary, samples, style, max_new_tokens)
            new = [
                {
                    "series": s.name, "length": length, "depth": depth, "repeat": r,
                    "tokens": sample.num_tokens, "responses": given,
                    "needles": [n.text for n in sample.needles],
                    **{name: protocol.mark(name, sample, given) for name in SCORES},
                }
                for r, (sample, given) in enumerate(zip(samples, answers, strict=True))
            ]  # fmt: skip
            with files.explain_disk_errors(path):
                handle.write(b"".join(files.json_bytes(row) + b"\n" for row in new))
                handle.flush()
            rows += new
            progress.update(1, score=float(np.mean([row[score] for row in new])))
    files.write_json(
        folder / "result.json",
        {
            "arm": arm, "score": score, "threshold": threshold, "repeats": repeats, "rope": rope,
            "trained_length": trained.cfg.max_position_embeddings,
            "lengths": list(lengths), "depths": list(depths),
            "series": {s.name: summary(rows, s.name, lengths, depths, score, threshold)
                       for s in series},
        },
    )  # fmt: skip


def stretched(cfg: ModelConfig, rope: Rope, longest: int, factor: float | None) -> ModelConfig:
    """The config that reads rows of up to `longest` tokens in the way of `rope`."""
    trained = cfg.max_position_embeddings
    ratio = factor or max(1.0, longest / trained)
    changes: dict[str, Any] = {
        "own": {},
        "none": {"rope_scaling": None, "max_position_embeddings": max(trained, longest)},
        "dynamic": {"rope_scaling": DynamicNTK(factor or 2.0)},
        "linear": {
            "rope_scaling": PositionInterpolation(ratio),
            "max_position_embeddings": max(trained, longest),
        },
        "yarn": {
            "rope_scaling": YaRN(ratio, trained),
            "max_position_embeddings": max(trained, longest),
        },
    }
    if rope not in changes:
        raise UserError(f"needle: rope is {rope!r}; choose from {', '.join(changes)}")
    return dataclasses.replace(cfg, **changes[rope])


def summary(
    rows: Sequence[dict], name: str, lengths: Sequence[int], depths: Sequence[float],
    score: str, threshold: float,
) -> dict[str, Any]:  # fmt: skip
    """Of one series: every score as [depths][lengths], and what `score` comes to at each length."""
    mine = [row for row in rows if row["series"] == name]

    def cell(key: str, length: int, depth: float) -> float:
        return float(
            np.mean([r[key] for r in mine if (r["length"], r["depth"]) == (length, depth)])
        )

    # A text is put to every depth, so texts are the units of the interval, not prompts.
    by_text = [
        [
            float(np.mean([r[score] for r in mine if (r["length"], r["repeat"]) == (length, text)]))
            for text in sorted({r["repeat"] for r in mine})
        ]
        for length in lengths
    ]
    found = [student(values) for values in by_text]
    return {
        "scores": {k: [[cell(k, n, d) for n in lengths] for d in depths] for k in SCORES},
        "mean": [i.mean for i in found],
        "low": [max(i.low, 0.0) for i in found],
        "high": [min(i.high, 1.0) for i in found],
        "effective_length": protocol.effective_length(lengths, [i.mean for i in found], threshold),
    }


def _sizes(cfg: ModelConfig, longest: int, cache_bytes: int, slots: int) -> EngineConfig:
    """An engine of as many pages as `cache_bytes` hold, and one text at least."""
    per_page = kv.PAGE * kv.bytes_per_token(cfg, "auto")
    needed, pages = -(-longest // kv.PAGE), cache_bytes // per_page
    if pages < needed:
        raise UserError(
            f"needle: a text of {longest} tokens takes {needed * per_page} bytes of keys and "
            f"values; raise cache_bytes {cache_bytes} or leave out the longest length"
        )
    return EngineConfig(
        slots=slots,
        max_length=needed * kv.PAGE,
        pages=min(pages, slots * needed),
        prefill=((1, _TOKENS_OF_PREFILL), (slots, 32)),
    )


def _texts(folder: Path) -> Iterator[str]:
    corpus = folder / "corpus" if (folder / "corpus").is_dir() else folder
    if (corpus / "manifest.json").is_file():
        found = list(documents.read(corpus, "validation"))
        filler = [d.text for d in found if d.source == "filler"]
        yield from filler or [d.text for d in found]
        return
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise UserError(f"{folder} is no haystack: it holds neither a corpus nor .txt files")
    for path in paths:
        try:
            yield path.read_text()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}); convert it") from error


def _answers(
    engine: Engine, vocabulary: Tokenizer, samples: Sequence[protocol.Sample], style: str,
    max_new_tokens: int,
) -> list[list[str]]:  # fmt: skip
    """For each sample, one response to all of its needles or one to each."""
    if style == "chat":
        groups = [
            [chat.render([{"role": "user", "content": s.prompt}], vocabulary,
                         add_generation_prompt=True).ids]
            for s in samples
        ]  # fmt: skip
        stop: tuple[str, ...] = ()
    else:
        groups = [
            [[vocabulary.bos_id, *vocabulary.encode(f"{s.prompt}\n{n.opening}")] for n in s.needles]
            for s in samples
        ]
        stop = ("\n",)
    responses = engine.run(
        [
            Request(ids, max_new_tokens, stop=stop,
                    stop_ids=(vocabulary.eos_id, vocabulary.im_end_id))
            for group in groups for ids in group
        ]
    )  # fmt: skip
    texts = iter(vocabulary.decode(r.tokens).partition("\n")[0] if stop else
                 vocabulary.decode(r.tokens) for r in responses)  # fmt: skip
    if stop:
        return [[n.opening + next(texts) for n in s.needles] for s in samples]
    return [[next(texts)] for _ in samples]


def _cell(row: dict) -> tuple[str, int, float]:
    return row["series"], row["length"], row["depth"]


def _finished(path: Path, repeats: int) -> list[dict]:
    """The rows of whole cells; those of a cell that was cut are taken out of the file."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # killed while writing
        rows.append(files.parse_json(line, f"{path}:{number}"))
    counts: dict[tuple, int] = {}
    for row in rows:
        counts[_cell(row)] = counts.get(_cell(row), 0) + 1
    whole = [row for row in rows if counts[_cell(row)] == repeats]
    files.write_jsonl(path, whole)
    return whole
