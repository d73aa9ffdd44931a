"""Pre-training in phases (InternLM2 section 3.4): short context, long context, enhancement.

Each phase has its own length, batch, mixture, learning rate and RoPE base; parameters, optimizer
state and the count of steps go through all of them. The report keeps half of the long phase's data
short and raises the RoPE base with the length; its third phase mixes retrieved STEM data 65%,
special domains 8% and selected high-quality data 26%, at a lower learning rate and batch.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internlm2_jax import distributed, files, sharding
from internlm2_jax.data import documents, mixture
from internlm2_jax.data.manifest import TokenReader, TokenSource, open_split
from internlm2_jax.data.pipeline import first_batches
from internlm2_jax.data.prefetch import Prefetch
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.data.windows import WINDOW_TOKENS
from internlm2_jax.errors import UserError
from internlm2_jax.evals.perplexity import unigram_baseline
from internlm2_jax.evals.quick import QuickSuite
from internlm2_jax.infer import engine
from internlm2_jax.infer.requests import check_prompt
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.remat import Remat
from internlm2_jax.stages.phases import Course, Phase
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.checkpoint import save_model_json
from internlm2_jax.train.faults import Recovery
from internlm2_jax.train.loop import fit
from internlm2_jax.train.objectives import evaluate_loss
from internlm2_jax.train.step import init_state

log = logging.getLogger(__name__)
# A function of model, parameters and tokenizer.
Suite = Callable[[Any, Any, Tokenizer], Mapping[str, float | None]]
_COUNTED = 2**24  # tokens of a source on the disk


@distributed.collective
def pretrain(
    folder: Path,
    *,
    tokenizer: Path | str,
    corpus: Path | str | None = None,
    instructions: Path | str | None = None,
    model: ModelConfig,
    phases: Sequence[Phase],
    seed: int = 0,
    mup_base_width: int | None = None,
    layout: str = "",
    remat: Remat = "full",
    in_memory_tokens: int = 2**30,
    window_tokens: int = WINDOW_TOKENS,
    windows: int = 16,
    prefetch: int = 2,
    enhancement_tasks: int = 8000,
    validation_tokens: int = 32768,
    validate_every: int = 200,
    checkpoint_every: int = 200,
    keep_checkpoints_every: int = 0,
    max_rollbacks: int = 3,
    loss_spike: float = 0.0,
    spike_window: int = 128,
    log_every: int = 10,
    suites: Mapping[str, Suite | Mapping[str, Any]] | None = None,
    prompts: Sequence[str] = (),
    sample_every: int = 0,
    sample_tokens: int = 64,
) -> None:
    """Trains `model` through `phases` and leaves checkpoints, metrics and result.json in `folder`.

    The checkpoint's model.json carries the last phase's RoPE base and length.

    Args:
        tokenizer: folder with tokenizer.model and tokens/.
        corpus, instructions: folders of those stages, from which the sources "stem", "special" and
            "selected" are made when a mixture names one and tokens/ does not have it.
        mup_base_width: muP, MiniCPM's form: hidden matrices start and learn as in a model of this
            width (train/optimizer.py); the multipliers of the forward pass are in `model.mup`.
        layout: the mesh (sharding.py), empty for one device.
        remat: what a block keeps for its gradient (models/remat.py).
        in_memory_tokens: a source of more tokens stays on the disk (data/windows.py), of which
            `windows` windows of `window_tokens` are in memory.
        prefetch: batches made ahead of their step.
        validation_tokens: counts per source.
        keep_checkpoints_every: beside the two newest and those of phase ends, every so many stay.
        max_rollbacks, loss_spike, spike_window: what becomes of a bad loss (`Recovery` in
            train/faults.py).
        suites: quick evaluations, of which each validation logs NAME/KEY for what they return: an
            `evals.quick.QuickSuite` or its fields, or any function of model, parameters, tokenizer.
        prompts: continued greedily by `sample_tokens` tokens every `sample_every` steps (0: when it
            validates), into samples.jsonl.
    """
    # ------------------------------------------------------------------ data
    tokenizer = Path(tokenizer)
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    config = dataclasses.replace(model, vocab_size=vocabulary.vocab_size)
    asked = [[vocabulary.bos_id, *vocabulary.encode(prompt)] for prompt in prompts]
    for phase in phases:
        for n, ids in enumerate(asked):
            check_prompt(phase.model(config), ids, sample_tokens, f"prompts.{n}")
    shortest = min(phase.sequence_length for phase in phases)
    quick = {n: _suite(n, given, vocabulary, shortest) for n, given in (suites or {}).items()}
    train_sources, validation = (
        open_split(
            tokenizer / "tokens",
            split,
            in_memory=in_memory_tokens,
            tokenizer_sha256=vocabulary.sha256,
        )
        for split in ("train", "validation")
    )
    made = _enhancement(
        phases, train_sources, corpus, instructions, vocabulary, enhancement_tasks, seed
    )
    sources = {**train_sources, **made}
    packs = [
        mixture.Rows(
            phase.sequence_length,
            short_length=phase.short_length,
            long_length=phase.sequence_length // 2,
            window_tokens=window_tokens,
            windows=windows,
            folder=folder,
            writes=jax.process_index() == 0,
        )
        for phase in phases
    ]
    width_ratio = 1.0 if mup_base_width is None else config.embed_dim / mup_base_width
    course = Course(
        phases,
        config,
        [_present(phase, pack, sources) for phase, pack in zip(phases, packs, strict=True)],
        layout=layout,
        remat=remat,
        width_ratio=width_ratio,
        seed=seed,
    )
    at_once = math.lcm(8, sharding.Layout.parse(layout).batch_ways)
    held_out = {
        pack.length: {
            name: first_batches(source, validation_tokens, at_once)
            for name in validation
            if (source := pack.pack(name, validation)) is not None
        }
        for pack in packs
    }

    # ------------------------------------------------------------ what is watched
    measures = [evaluate_loss(model) for model in course.models]

    def validate(done: int, state: dict[str, Any]) -> dict[str, Any]:
        i, _ = course.locate(done - 1)
        rows = held_out[phases[i].sequence_length]
        losses = {
            f"loss/{n}": measures[i](state["params"], map(sharding.place_rows, r))
            for n, r in rows.items()
        }
        mean = float(np.mean(list(losses.values())))
        found = {
            f"{name}/{key}": value
            for name, suite in quick.items()
            for key, value in suite(course.models[i], state["params"], vocabulary).items()
        }
        return {"phase": phases[i].name, "loss": mean, **losses, **found}

    def sample(done: int, state: dict[str, Any]) -> list[dict[str, Any]]:
        i, _ = course.locate(done - 1)
        out = engine.generate(
            course.models[i],
            state["params"],
            asked,
            max_new_tokens=sample_tokens,
            sampling=Sampling(temperature=0.0),
            stop_ids=(vocabulary.eos_id,),
        )
        responses = [vocabulary.decode(tokens) for tokens in out.tokens]
        return [
            {"phase": phases[i].name, "prompt": prompt, "response": response}
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    # ------------------------------------------------------------------ training
    with sharding.use(layout):
        first = course.models[0]
        init = optimizers.scaled_init(first.init, width_ratio)
        params = sharding.create(init, first.axes, jax.random.key(seed))
        # The thread that reads ahead has no mesh of its own.
        read = functools.partial(course.read, mesh=jax.sharding.get_mesh())
        with Prefetch(read, course.steps, depth=prefetch) as ahead:
            state = fit(
                folder,
                init_state(params, course.optimizers[0]),
                course.train,
                steps=course.steps,
                label="pretrain",
                batch=lambda step, skipped: course.place(ahead(step, skipped), step, skipped),
                work=course.work,
                shown=("loss", "phase"),
                log_every=log_every,
                validate=validate,
                validate_every=validate_every,
                sample=sample if prompts else None,
                sample_every=sample_every or validate_every,
                checkpoint_every=checkpoint_every,
                keep_every=keep_checkpoints_every,
                milestones=course.ends,
                recovery=Recovery(max_rollbacks, loss_spike, spike_window),
            )
        final = validate(course.steps, state)

    # ------------------------------------------------------------------- results
    if not distributed.is_first():
        return
    save_model_json(folder, course.models[-1].cfg, "lm")
    baseline = unigram_baseline(
        map(_tokens, train_sources.values()),
        map(_tokens, validation.values()),
        vocabulary.vocab_size,
    )
    files.write_json(
        folder / "result.json",
        {
            "num_params": config.num_params(),
            "tokens_seen": sum(p.tokens for p in phases),
            "unigram_entropy": baseline.cross_entropy,
            "validation_entropy": baseline.validation_entropy,
            "validation_loss": final["loss"],
            "validation_loss_by_source": {
                n: final[f"loss/{n}"] for n in held_out[phases[-1].sequence_length]
            },
            "phases": _results(course, files.read_jsonl(folder / "metrics.jsonl")),
        },
    )


def _enhancement(
    phases: Sequence[Phase],
    tokenized: Mapping[str, Any],
    corpus: Path | str | None,
    instructions: Path | str | None,
    vocabulary: Tokenizer,
    num_tasks: int,
    seed: int,
) -> dict[str, Any]:
    """Those of the sources of mixture.enhancement that a mixture names and nobody tokenized."""
    named = {name.rpartition("/")[2] for phase in phases for name in phase.mixture}
    wanted = sorted(named & set(mixture.ENHANCEMENT) - tokenized.keys())
    if not wanted:
        return {}
    if corpus is None or instructions is None:
        raise UserError(
            f"a mixture names {', '.join(wanted)}, which the tokenized corpus does not have; give "
            "corpus and instructions, from which they can be made, or tokenize such a source"
        )
    texts = mixture.enhancement(
        documents.read(Path(corpus) / "corpus", "train"),
        files.read_jsonl(Path(instructions) / "sft.jsonl"),
        num_tasks=num_tasks,
        seed=seed,
    )
    return {name: mixture.encode(texts[name], vocabulary) for name in wanted}


def _present(phase: Phase, pack: mixture.Rows, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the phase's sources; those that the corpus does not have are left out, and said."""
    packed = {name: pack.pack(name, sources) for name in phase.mixture}
    found = {name: rows for name, rows in packed.items() if rows is not None and len(rows)}
    if not found:
        raise UserError(
            f"phase {phase.name!r} finds none of its sources ({', '.join(phase.mixture)}) in the "
            f"corpus, which has {', '.join(sorted(sources))}; change its mixture"
        )
    if absent := [name for name in packed if name not in found]:
        log.warning(
            "phase %r: the corpus has no %s; the other sources take its share",
            phase.name,
            ", ".join(absent),
        )
    return found


def _suite(
    name: str, given: Suite | Mapping[str, Any], vocabulary: Tokenizer, max_length: int
) -> Suite:
    """A suite with its items read, so that what is wrong is said before anything is trained."""
    if isinstance(given, Mapping):
        try:
            given = QuickSuite(**given)
        except TypeError as error:
            raise UserError(f"suites, {name}: {error}") from error
    if isinstance(given, QuickSuite):
        given.check(vocabulary, max_length)
    return given


def _tokens(source: TokenSource | TokenReader) -> np.ndarray:
    """What the frequencies of tokens are counted on: of a source on the disk, its beginning."""
    return source.tokens(0, _COUNTED) if isinstance(source, TokenReader) else source.tokens


def _results(course: Course, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each phase was, what it read, and the validation loss at its end."""
    validated = [(row["step"], row["loss"]) for row in metrics if row["split"] == "validation"]
    results = []
    parts = zip(course.phases, course.ends, course.rows, course.batches, strict=True)
    for phase, end, rows, batches in parts:
        shares = batches.weights
        results.append(
            {
                **dataclasses.asdict(phase),
                "first_step": end - phase.steps,
                "last_step": end,
                "validation_loss": next((v for s, v in reversed(validated) if s <= end), None),
                "sources": {n: len(source) for n, source in rows.items()},
                "shares": shares,
                "passes": {n: x * phase.rows / len(rows[n]) for n, x in shares.items()},
            }
        )
    return results
