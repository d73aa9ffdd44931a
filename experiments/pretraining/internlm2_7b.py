"""InternLM2-7B from scratch: 4k, then 32k, then the enhancement mixture (report, section 3).

Needs   : a tokenized corpus (docs/data.md) with the sources `text` and `code`, its tokenizer, and
          the instruction folder from which the enhancement mixture is made
Mesh    : 64 chips of v5p, or any number with --set layout=...; `internlm2 plan` says what fits
Expect  : not trained by us; plans for named pods are in docs/planning.md
Run     : internlm2 plan experiments/pretraining/internlm2_7b.py --topology v5p:4x4x4
          internlm2 run  experiments/pretraining/internlm2_7b.py --set data=/path/to/data

Stated by the report: sizes, learning rate 3e-4 to a tenth of it, 4M tokens a step, 90% / 9% / 24.4B
tokens, RoPE base 50,000 then 1,000,000, half of the long phase's rows short, 65 / 8 / 26%. Choices:
2.6T tokens (it says 2.0T to 2.6T), 1% of warm-up, equal text and code, half the batch and a tenth
of the learning rate for the third phase, one cosine a phase.
"""

from __future__ import annotations

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Phase, Pipeline


def experiment(
    size: str = "internlm2_7b",
    data: str = "data",
    layout: str = "fsdp=64",
    remat: str = "full",
    batch_tokens: int = 4 * 2**20,
    enhancement_tokens: int = 2 * 2**20,
    rows_at_once: int = 256,
    long_rows_at_once: int = 64,
    seed: int = 0,
) -> Config:
    """The run. `data` holds the folders tokenizer, corpus and instructions.

    `rows_at_once` rows of 4096 tokens, or `long_rows_at_once` of 32768, are taken together; a step
    accumulates over the rest of its batch.
    """
    short, long = 4096, 32768
    at_once = {short: rows_at_once, long: long_rows_at_once}

    def phase(name: str, steps: int, length: int, tokens: int = batch_tokens, **other) -> Config:
        rows = tokens // length
        accumulate = max(1, rows // at_once[length])
        fields = {"name": name, "steps": steps, "sequence_length": length, "batch_size": rows}
        return Config(Phase, **fields, accumulate=accumulate, short_length=short, **other)

    steps = 2_600_000_000_000 // batch_tokens
    return Config(
        Pipeline,
        pretrain=Partial(
            stages.pretrain,
            tokenizer=f"{data}/tokenizer",
            corpus=f"{data}/corpus",
            instructions=f"{data}/instructions",
            model=Config(preset, size),
            layout=layout,
            remat=remat,
            seed=seed,
            validate_every=2000,
            checkpoint_every=500,
            phases=[
                phase(
                    "short",
                    steps * 90 // 100,
                    short,
                    rope_theta=50_000.0,
                    learning_rate=3e-4,
                    warmup=steps // 100,
                    final_ratio=0.19,
                    mixture={"text": 0.5, "code": 0.5},
                ),
                phase(
                    "long",
                    steps * 9 // 100,
                    long,
                    rope_theta=1_000_000.0,
                    learning_rate=5.7e-5,
                    final_ratio=0.53,
                    mixture={
                        "short/text": 0.25,
                        "short/code": 0.25,
                        "long/text": 0.25,
                        "long/code": 0.25,
                    },
                ),
                phase(
                    "enhancement",
                    24_400_000_000 // enhancement_tokens,
                    long,
                    enhancement_tokens,
                    rope_theta=1_000_000.0,
                    learning_rate=3e-5,
                    final_ratio=0.1,
                    mixture={"stem": 0.65, "special": 0.08, "selected": 0.26},
                ),
            ],
        ),
    )


def tiny(data: str = "data", layout: str = "", seed: int = 0) -> Config:
    """The same three phases in two steps each, small enough for a test."""
    config = experiment("tiny", data, layout, seed=seed)
    lengths = {4096: (64, 4), 32768: (256, 2)}
    for phase in config.pretrain.phases:
        phase.sequence_length, phase.batch_size = lengths[phase.sequence_length]
        phase.steps, phase.warmup, phase.accumulate, phase.short_length = 2, 0, 2, 64
    config.pretrain.validation_tokens = 1024
    return config
