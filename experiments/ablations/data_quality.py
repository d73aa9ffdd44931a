"""What cleaning is worth: raw text, filtered, de-duplicated, both; one validation set for all.

The arms read the same files with some steps of the corpus job left out, share the tokenizer of the
whole job, and train on the same number of tokens. Measured are the share that each step drops and
the loss on the validation split of the whole job. Copies of its documents are in the training split
of the arms that do not de-duplicate, which lowers their loss as in real life.

Needs   : nothing; the corpus is what every machine has (sources and documentation), or --corpus DIR
Mesh    : one CPU device
Expect  : see docs/ablations.md
Run     : internlm2 run experiments/ablations/data_quality.py \\
              --sweep arm=raw,deduplicated,filtered,both --seeds 3
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
ARMS = {
    "raw": {"clean": False, "deduplicate": False},
    "deduplicated": {"clean": False, "deduplicate": True},
    "filtered": {"clean": True, "deduplicate": False},
    "both": {"clean": True, "deduplicate": True},
}


def experiment(
    arm: str = "both",
    seed: int = 0,
    corpus: str | None = None,
    steps: int = 300,
    preset_name: str = "demo",
) -> Config:
    """`seed` is of the model and the order of its data, so that seeds share their corpora."""
    if arm not in ARMS:
        raise UserError(f"arm is {arm!r}; it is one of {', '.join(ARMS)}")
    read = functools.partial(
        Partial, stages.corpus, files_below=corpus, max_bytes=8_000_000, validation_fraction=0.04
    )
    return Config(
        Pipeline,
        reference=read(**ARMS["both"]),
        tokenizer=Partial(stages.tokenizer, corpus=output("reference"), vocab_size=2048),
        corpus=read(**ARMS[arm]),
        tokens=Partial(stages.tokenizer, corpus=output("corpus"), model=output("tokenizer")),
        pretrain=short_pretrain(
            output("tokens"),
            Config(preset, preset_name),
            {"code": 0.5, "text": 0.5},
            steps=steps,
            seed=seed,
        ),
        measure=Partial(
            stages.measure,
            model=output("pretrain"),
            tokenizer=output("tokenizer"),
            corpus=output("reference"),
            funnel=output("corpus"),
            arm=arm,
        ),
    )


def tiny(arm: str = "both", seed: int = 0, corpus: str | None = None) -> Config:
    """The same in four steps."""
    config = experiment(arm=arm, seed=seed, corpus=corpus, steps=4)
    config.reference.max_bytes = config.corpus.max_bytes = 1_000_000
    config.tokenizer.vocab_size = 1024
    config.pretrain.validation_tokens = config.measure.max_tokens = 1024
    return config
