"""Grouped-query attention against multi-head and multi-query, at equal parameters.

The query heads stay; what fewer key and value heads save goes into the MLP, whose three matrices
make parameters equal to within two thirds of a column of each. Measured are the loss,
the bytes of cache a token, and the tokens a second of the engine.

Needs   : nothing; the corpus is what every machine has (sources and documentation), or --corpus DIR
Mesh    : one CPU device
Expect  : see docs/ablations.md
Run     : internlm2 run experiments/ablations/attention_heads.py --sweep arm=mha,gqa,mqa --seeds 3
          (as large as a pod allows: --set preset_name=internlm2_1_8b --set steps=20000)
"""

from __future__ import annotations

import functools

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.errors import UserError
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Output, Pipeline
from internlm2_jax.stages.short import short_pretrain

output = functools.partial(Config, Output)
GROUPS = {"mha": 1, "gqa": 2, "mqa": None}  # query heads of a key/value head; None: all


def experiment(
    arm: str = "gqa",
    seed: int = 0,
    corpus: str | None = None,
    steps: int = 300,
    preset_name: str = "demo",
    rows: int = 8,
) -> Config:
    """`seed` is of the model and the order of its data, so that all runs share one corpus."""
    if arm not in GROUPS:
        raise UserError(f"arm is {arm!r}; it is one of {', '.join(GROUPS)}")
    base = preset(preset_name)
    kv_heads = base.num_heads // (GROUPS[arm] or base.num_heads)
    saved = 2 * (base.num_heads - kv_heads) * base.head_dim  # columns of k and v
    return Config(
        Pipeline,
        corpus=Partial(
            stages.corpus, files_below=corpus, max_bytes=8_000_000, validation_fraction=0.04
        ),
        tokenizer=Partial(stages.tokenizer, corpus=output("corpus"), vocab_size=2048),
        pretrain=short_pretrain(
            output("tokenizer"),
            Config(
                preset, preset_name, num_kv_heads=kv_heads, mlp_dim=base.mlp_dim + round(saved / 3)
            ),
            {"code": 0.5, "text": 0.5},
            steps=steps,
            seed=seed,
            rows=rows,
        ),
        measure=Partial(
            stages.measure,
            model=output("pretrain"),
            tokenizer=output("tokenizer"),
            corpus=output("corpus"),
            arm=arm,
            decode=(8, 64, 64),
        ),
    )


def tiny(arm: str = "gqa", seed: int = 0, corpus: str | None = None) -> Config:
    """The same in four steps."""
    config = experiment(arm=arm, seed=seed, corpus=corpus, steps=4)
    config.corpus.max_bytes, config.tokenizer.vocab_size = 1_000_000, 1024
    config.pretrain.validation_tokens = config.measure.max_tokens = 1024
    config.measure.decode = (2, 16, 4)
    return config
