"""Pre-training in phases (InternLM2 section 3.4): short context, long context, enhancement.

Each phase has its own length, batch, mixture, learning rate and RoPE base; parameters, optimizer
state and the count of steps go through all of them. The report keeps half of the long phase's data
short and raises the RoPE base with the length; its third phase mixes retrieved STEM data 65%,
special domains 8% and selected high-quality data 26%, at a lower learning rate and batch.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internlm2_jax import distributed, files, sharding
from internlm2_jax.data import documents, mixture
from internlm2_jax.data.manifest import load_split
from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import Batches, first_batches
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.evals.perplexity import unigram_baseline
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.models.remat import Remat
from internlm2_jax.plan.analytic import train_flops
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.checkpoint import save_model_json
from internlm2_jax.train.faults import Recovery
from internlm2_jax.train.loop import fit
from internlm2_jax.train.objectives import evaluate_loss, language_model_loss
from internlm2_jax.train.speed import Work
from internlm2_jax.train.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of pre-training.

    Attributes:
        name: what plots call it.
        steps: optimizer steps.
        sequence_length: tokens in a packed row (T).
        batch_size: rows in a step (B).
        rope_theta: RoPE base while this phase lasts.
        learning_rate: peak; decays by a cosine to `final_ratio` of it within the phase.
        warmup: steps of linear warm-up at the phase's start.
        mixture: source -> share of the rows; "short/NAME" is a source cut to `short_length`.
        short_length: documents of a "short/" source are cut to pieces of this many tokens.
        accumulate: parts in which the rows of a step are taken, one after another.
    """

    name: str
    steps: int
    sequence_length: int
    batch_size: int
    rope_theta: float
    learning_rate: float
    mixture: Mapping[str, float]
    final_ratio: float = 1.0
    warmup: int = 0
    short_length: int = 128
    accumulate: int = 1

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence_length


@distributed.collective
def pretrain(
    folder: Path,
    *,
    tokenizer: Path | str,
    corpus: Path | str,
    instructions: Path | str,
    model: ModelConfig,
    phases: Sequence[Phase],
    seed: int = 0,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    z_loss: float = 0.0,
    layout: str = "",
    remat: Remat = "full",
    enhancement_tasks: int = 8000,
    validation_tokens: int = 32768,
    validate_every: int = 200,
    checkpoint_every: int = 200,
    keep_checkpoints_every: int = 0,
    max_rollbacks: int = 3,
    loss_spike: float = 0.0,
    spike_window: int = 128,
    log_every: int = 10,
    prompts: Sequence[str] = (),
    sample_every: int = 0,
    sample_tokens: int = 64,
) -> None:
    """Trains `model` through `phases` and leaves checkpoints, metrics and result.json in `folder`.

    `tokenizer`, `corpus` and `instructions` are the folders of those stages. `validation_tokens`
    counts per source. The checkpoint's model.json carries the last phase's RoPE base and length.
    `layout` is the mesh (sharding.py), empty for one device; `remat` what a block keeps for its
    gradient (models/remat.py). Two checkpoints stay, those of phase ends, and one every
    `keep_checkpoints_every` steps. `max_rollbacks`, `loss_spike` and `spike_window` say what
    becomes of a bad loss (`Recovery` in train/faults.py).
    `prompts` are continued greedily, by `sample_tokens` tokens, every `sample_every` steps (0: when
    it validates), into samples.jsonl.
    """
    # ------------------------------------------------------------------ data
    tokenizer, corpus, instructions = Path(tokenizer), Path(corpus), Path(instructions)
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    config = dataclasses.replace(model, vocab_size=vocabulary.vocab_size)
    tokens = tokenizer / "tokens"
    train_sources = load_split(tokens, "train", tokenizer_sha256=vocabulary.sha256)
    validation = load_split(tokens, "validation", tokenizer_sha256=vocabulary.sha256)
    texts = mixture.enhancement(
        documents.read(corpus / "corpus", "train"),
        files.read_jsonl(instructions / "sft.jsonl"),
        num_tasks=enhancement_tasks,
        seed=seed,
    )
    sources = {**train_sources, **{n: mixture.encode(t, vocabulary) for n, t in texts.items()}}
    mixtures = [_present(phase, sources) for phase in phases]
    batches = [
        Batches(
            rows,
            {n: phase.mixture[n] for n in rows},
            batch_size=phase.batch_size,
            seed=seed + i,
        )
        for i, (phase, rows) in enumerate(zip(phases, mixtures, strict=True))
    ]
    mesh = sharding.Layout.parse(layout)
    at_once = math.lcm(8, mesh.batch_ways)
    held_out = {
        length: {
            name: first_batches(PackedSource(source, length), validation_tokens, at_once)
            for name, source in validation.items()
            if len(source)
        }
        for length in {phase.sequence_length for phase in phases}
    }

    # ----------------------------------------------------------------- model
    ends = list(itertools.accumulate(phase.steps for phase in phases))
    schedule = optimizers.join(
        [
            optimizers.warmup_cosine(
                p.learning_rate, p.steps, warmup=p.warmup, final_ratio=p.final_ratio
            )
            for p in phases
        ],
        [p.steps for p in phases],
    )
    optimizer = optimizers.adamw(schedule, weight_decay=weight_decay, clip_norm=clip_norm)
    models = [
        build(
            dataclasses.replace(
                config, rope_theta=p.rope_theta, max_position_embeddings=p.sequence_length
            )
        )
        for p in phases
    ]
    for m, p in zip(models, phases, strict=True):
        mesh.check(m.axes, m.abstract, batch=p.batch_size // p.accumulate, length=p.sequence_length)
    steps = [
        make_train_step(language_model_loss(m, z_loss, remat), optimizer, accumulate=p.accumulate)
        for m, p in zip(models, phases, strict=True)
    ]
    measures = [evaluate_loss(m) for m in models]

    # -------------------------------------------------------------- training
    def batch(step: int, skipped: int) -> Any:
        i = bisect.bisect_right(ends, step)
        first = ends[i] - phases[i].steps
        return sharding.place_rows(batches[i](step - first + skipped))

    def train(step: int, state: dict[str, Any], rows: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        i = bisect.bisect_right(ends, step)
        state, measured = steps[i](state, rows)
        return state, {**measured, "phase": phases[i].name, "learning_rate": schedule(step)}

    def work(step: int) -> Work:
        i = bisect.bisect_right(ends, step)
        tokens = phases[i].batch_size * phases[i].sequence_length
        return Work(tokens, tokens * train_flops(models[i].cfg, phases[i].sequence_length))

    def sample(done: int, state: dict[str, Any]) -> list[dict[str, Any]]:
        i = bisect.bisect_right(ends, done - 1)
        out = engine.generate(
            models[i],
            state["params"],
            [[vocabulary.bos_id, *vocabulary.encode(prompt)] for prompt in prompts],
            max_new_tokens=sample_tokens,
            sampling=Sampling(temperature=0.0),
            stop_ids=(vocabulary.eos_id,),
        )
        responses = [vocabulary.decode(tokens) for tokens in out.tokens]
        return [
            {"phase": phases[i].name, "prompt": prompt, "response": response}
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def validate(done: int, state: dict[str, Any]) -> dict[str, Any]:
        i = bisect.bisect_right(ends, done - 1)
        rows = held_out[phases[i].sequence_length]
        losses = {
            f"loss/{n}": measures[i](state["params"], map(sharding.place_rows, r))
            for n, r in rows.items()
        }
        return {"phase": phases[i].name, "loss": float(np.mean(list(losses.values()))), **losses}

    with sharding.use(layout):
        params = sharding.create(models[0].init, models[0].axes, jax.random.key(seed))
        state = fit(
            folder,
            init_state(params, optimizer),
            train,
            steps=ends[-1],
            label="pretrain",
            batch=batch,
            work=work,
            shown=("loss", "phase"),
            log_every=log_every,
            validate=validate,
            validate_every=validate_every,
            sample=sample if prompts else None,
            sample_every=sample_every or validate_every,
            checkpoint_every=checkpoint_every,
            keep_every=keep_checkpoints_every,
            milestones=ends,
            recovery=Recovery(max_rollbacks, loss_spike, spike_window),
        )
        final = validate(ends[-1], state)

    # --------------------------------------------------------------- results
    if not distributed.is_first():
        return
    save_model_json(folder, models[-1].cfg, "lm")
    rows = files.read_jsonl(folder / "metrics.jsonl")
    baseline = unigram_baseline(
        [s.tokens for s in train_sources.values()],
        [s.tokens for s in validation.values()],
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
            "phases": [
                {
                    **dataclasses.asdict(phase),
                    "first_step": end - phase.steps,
                    "last_step": end,
                    "validation_loss": _last_validation(rows, end),
                    "sources": {n: len(source) for n, source in present.items()},
                }
                for phase, end, present in zip(phases, ends, mixtures, strict=True)
            ],
        },
    )


def _present(phase: Phase, sources: Mapping[str, Any]) -> dict[str, PackedSource]:
    """Packed rows of the phase's sources; those that the corpus does not have are left out."""
    views = {
        name: mixture.view(
            name,
            sources,
            short_length=phase.short_length,
            long_length=phase.sequence_length // 2,
        )
        for name in phase.mixture
    }
    packed = {n: PackedSource(v, phase.sequence_length) for n, v in views.items() if v is not None}
    if not packed:
        raise UserError(
            f"phase {phase.name!r} finds none of its sources ({', '.join(phase.mixture)}) in the "
            f"corpus, which has {', '.join(sorted(sources))}; change its mixture"
        )
    return packed


def _last_validation(rows: list[dict[str, Any]], step: int) -> float | None:
    """The newest validation loss up to and including `step`."""
    losses = [r["loss"] for r in rows if r["split"] == "validation" and r["step"] <= step]
    return losses[-1] if losses else None
