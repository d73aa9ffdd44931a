"""Pre-training in phases (InternLM2 section 3.4): short context, long context, enhancement.

Each phase has its own length, batch, mixture, learning rate and RoPE base; parameters, optimizer
state and the count of steps go through all of them. The report keeps half of the long phase's data
short and raises the RoPE base with the length; its third phase mixes retrieved STEM data 65%,
special domains 8% and selected high-quality data 26%, at a lower learning rate and batch.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from internlm2_jax import distributed, files, sharding
from internlm2_jax.data import documents, mixture
from internlm2_jax.data.manifest import TokenReader, TokenSource, open_split
from internlm2_jax.data.mixture import WhenShort
from internlm2_jax.data.pipeline import Batches, first_batches
from internlm2_jax.data.prefetch import Prefetch
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.data.windows import WINDOW_TOKENS
from internlm2_jax.errors import UserError
from internlm2_jax.evals.perplexity import unigram_baseline
from internlm2_jax.evals.quick import QuickSuite
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
from internlm2_jax.train.objectives import by_source, evaluate_loss, language_model_loss
from internlm2_jax.train.speed import Work
from internlm2_jax.train.step import init_state, make_train_step

log = logging.getLogger(__name__)
Suite = Callable[
    [Any, Any, Tokenizer], Mapping[str, float | None]
]  # of model, parameters, tokenizer
_COUNTED = 2**24  # tokens of a source on the disk


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of pre-training.

    Attributes:
        name: what plots call it.
        steps: optimizer steps.
        sequence_length: tokens in a packed row (T).
        batch_size: rows in a step (B).
        rope_theta: RoPE base while this phase lasts.
        learning_rate: peak; goes down to `final_ratio` of it within the phase.
        mixture: source -> share of the rows; "short/NAME" is the source's documents cut to
            `short_length`, "long/NAME" those of at least half a row.
        schedule: "cosine" over the whole phase, or "wsd": stable, then `decay` (train/optimizer.py)
            over the last `decay_steps`.
        warmup: steps of linear warm-up at the phase's start.
        ramp: (steps, rows) pairs: smaller batches with which the phase begins.
        epochs: source -> how often its rows may be repeated within the phase, e.g. 2.0.
        when_short: what a source lacks is given to the others ("share") or is an error ("error").
        short_length: documents of a "short/" source are cut to pieces of this many tokens.
        accumulate: parts in which the rows of a step are taken, one after another.
        weight_decay, clip_norm, z_loss: of the optimizer and the loss.
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
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: optimizers.Decay = "exponential"
    decay_steps: int = 0
    ramp: Sequence[tuple[int, int]] = ()
    epochs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    when_short: WhenShort = "share"
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise UserError(f"phase {self.name!r}: schedule is {self.schedule!r}; cosine or wsd")
        if self.schedule == "cosine" and self.decay_steps:
            raise UserError(
                f"phase {self.name!r}: decay_steps need schedule='wsd'; a cosine falls all along"
            )
        if sum(steps for steps, _ in self.ramp) > self.steps:
            raise UserError(f"phase {self.name!r}: its ramp is longer than its {self.steps} steps")

    @property
    def rows(self) -> int:
        """Rows of all steps."""
        ramped = sum(steps for steps, _ in self.ramp)
        small = sum(steps * size for steps, size in self.ramp)
        return small + (self.steps - ramped) * self.batch_size

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence_length

    def parts(self, rows: int) -> int:
        """In how many parts a batch of so many rows is taken: none larger than of a whole one."""
        return max(1, -(-rows * self.accumulate // self.batch_size))

    def learning_rates(self) -> optimizers.Schedule:
        """The learning rate over the phase's own steps."""
        if self.schedule == "cosine":
            return optimizers.warmup_cosine(
                self.learning_rate, self.steps, warmup=self.warmup, final_ratio=self.final_ratio
            )
        return optimizers.warmup_stable_decay(
            self.learning_rate,
            self.steps,
            decay=self.decay,
            decay_steps=self.decay_steps,
            warmup=self.warmup,
            final_ratio=self.final_ratio,
        )


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
    quick = {n: _suite(n, given, vocabulary) for n, given in (suites or {}).items()}
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
    mixtures = [_present(phase, pack, sources) for phase, pack in zip(phases, packs, strict=True)]
    batches = [
        Batches(
            rows,
            mixture.limited(
                {n: phase.mixture[n] for n in rows},
                {n: len(source) for n, source in rows.items()},
                phase.epochs,
                total=phase.rows,
                row_length=phase.sequence_length,
                when_short=phase.when_short,
                label=f"phase {phase.name!r}",
            ),
            batch_size=phase.batch_size,
            ramp=phase.ramp,
            seed=seed + i,
        )
        for i, (phase, rows) in enumerate(zip(phases, mixtures, strict=True))
    ]
    mesh = sharding.Layout.parse(layout)
    at_once = math.lcm(8, mesh.batch_ways)
    held_out = {
        pack.length: {
            name: first_batches(source, validation_tokens, at_once)
            for name in validation
            if (source := pack.pack(name, validation)) is not None
        }
        for pack in packs
    }

    # ----------------------------------------------------------------- model
    ends = list(itertools.accumulate(phase.steps for phase in phases))
    schedule = optimizers.join([p.learning_rates() for p in phases], [p.steps for p in phases])
    width_ratio = 1.0 if mup_base_width is None else config.embed_dim / mup_base_width
    # Of one kind of state, so that it goes from phase to phase.
    phase_optimizers = [
        optimizers.adamw(
            schedule,
            weight_decay=p.weight_decay,
            clip_norm=p.clip_norm,
            width_ratio=width_ratio,
        )
        for p in phases
    ]
    models = [
        build(
            dataclasses.replace(
                config, rope_theta=p.rope_theta, max_position_embeddings=p.sequence_length
            )
        )
        for p in phases
    ]
    for m, p in zip(models, phases, strict=True):
        for size in (p.batch_size, *(size for _, size in p.ramp)):
            _check_parts(p, size)
            mesh.check(m.axes, m.abstract, batch=size // p.parts(size), length=p.sequence_length)

    @functools.cache
    def step_of(i: int, parts: int) -> Any:
        loss = language_model_loss(models[i], phases[i].z_loss, remat, len(batches[i].names))
        return make_train_step(loss, phase_optimizers[i], accumulate=parts)

    measures = [evaluate_loss(m) for m in models]

    # -------------------------------------------------------------- training
    def locate(step: int) -> tuple[int, int]:
        """(number of the phase, step within it)."""
        i = bisect.bisect_right(ends, step)
        return i, step - (ends[i] - phases[i].steps)

    def work(step: int) -> Work:
        i, own = locate(step)
        tokens = batches[i].size(own) * phases[i].sequence_length
        return Work(tokens, tokens * train_flops(models[i].cfg, phases[i].sequence_length))

    def sample(done: int, state: dict[str, Any]) -> list[dict[str, Any]]:
        i, _ = locate(done - 1)
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
        i, _ = locate(done - 1)
        rows = held_out[phases[i].sequence_length]
        losses = {
            f"loss/{n}": measures[i](state["params"], map(sharding.place_rows, r))
            for n, r in rows.items()
        }
        mean = float(np.mean(list(losses.values())))
        found = {
            f"{name}/{key}": value
            for name, suite in quick.items()
            for key, value in suite(models[i], state["params"], vocabulary).items()
        }
        return {"phase": phases[i].name, "loss": mean, **losses, **found}

    with sharding.use(layout):
        devices = jax.sharding.get_mesh()

        def read(step: int, skipped: int) -> dict[str, np.ndarray]:
            """This process's rows of a batch; runs in a thread, where no mesh is set."""
            i, own = locate(step)
            own += skipped
            return batches[i](own, sharding.local_rows(batches[i].size(own), devices))

        def train(
            step: int, state: dict[str, Any], batch: dict[str, jax.Array]
        ) -> tuple[dict[str, Any], dict[str, Any]]:
            i, _ = locate(step)
            rows = len(batch["tokens"])
            state, measured = step_of(i, phases[i].parts(rows))(state, batch)
            return state, {
                **by_source(measured, batches[i].names),
                "phase": phases[i].name,
                "learning_rate": schedule(step),
                "batch_size": rows,
            }

        init = optimizers.scaled_init(models[0].init, width_ratio)
        params = sharding.create(init, models[0].axes, jax.random.key(seed))
        with Prefetch(read, ends[-1], depth=prefetch) as ahead:

            def batch(step: int, skipped: int) -> dict[str, jax.Array]:
                i, own = locate(step)
                return sharding.place_rows(ahead(step, skipped), batches[i].size(own + skipped))

            state = fit(
                folder,
                init_state(params, phase_optimizers[0]),
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
            "phases": [
                {
                    **dataclasses.asdict(phase),
                    "first_step": end - phase.steps,
                    "last_step": end,
                    "validation_loss": _last_validation(rows, end),
                    "sources": {n: len(source) for n, source in present.items()},
                    "shares": mixed.weights,
                    "passes": {
                        n: share * phase.rows / len(present[n])
                        for n, share in mixed.weights.items()
                    },
                }
                for phase, end, present, mixed in zip(phases, ends, mixtures, batches, strict=True)
            ],
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


def _check_parts(phase: Phase, rows: int) -> None:
    if rows % phase.parts(rows):
        raise UserError(
            f"phase {phase.name!r}: a batch of {rows} rows does not divide into "
            f"{phase.parts(rows)} parts; change batch_size, ramp or accumulate"
        )


def _suite(name: str, given: Suite | Mapping[str, Any], vocabulary: Tokenizer) -> Suite:
    """A suite with its items read, so that what is missing is said before anything is trained."""
    if isinstance(given, Mapping):
        try:
            given = QuickSuite(**given)
        except TypeError as error:
            raise UserError(f"suites, {name}: {error}") from error
    if isinstance(given, QuickSuite):
        given.load(vocabulary)
    return given


def _tokens(source: TokenSource | TokenReader) -> np.ndarray:
    """What the frequencies of tokens are counted on: of a source on the disk, its beginning."""
    return source.tokens(0, _COUNTED) if isinstance(source, TokenReader) else source.tokens


def _last_validation(rows: list[dict[str, Any]], step: int) -> float | None:
    """The newest validation loss up to and including `step`."""
    losses = [r["loss"] for r in rows if r["split"] == "validation" and r["step"] <= step]
    return losses[-1] if losses else None
