"""The third phase (report, 3.4): capability enhancement, or the same tokens of the usual mixture.

Both arms share the first phase and see as many tokens at the same learning rates; `on` reads tasks
with answers, questions about the corpus and selected documents, `off` goes on as before. Measured
are held-out tasks, of which neither arm has seen any (the share right, and the loss of the right
answers, since a tiny model answers few), and the loss on ordinary text: what the phase gives and
what it costs.

Needs   : nothing; the corpus is what every machine has (sources and documentation), or --corpus DIR
Mesh    : one CPU device
Expect  : see docs/ablations.md
Run     : internlm2 run experiments/ablations/capability_enhancement.py --sweep arm=on,off --seeds 3
"""

from __future__ import annotations

import functools

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.errors import UserError
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Output, Phase, Pipeline

output = functools.partial(Config, Output)
MIXTURES = {
    "on": {"stem": 0.65, "special": 0.08, "selected": 0.26},
    "off": {"code": 0.5, "text": 0.5},
}


def experiment(
    arm: str = "on",
    seed: int = 0,
    corpus: str | None = None,
    steps: int = 400,
    enhancement_steps: int = 200,
    preset_name: str = "demo",
) -> Config:
    """`seed` is of the model and the order of its data, so that all runs share one corpus."""
    if arm not in MIXTURES:
        raise UserError(f"arm is {arm!r}; it is one of {', '.join(MIXTURES)}")
    common = {"sequence_length": 128, "batch_size": 8, "rope_theta": 10_000.0}
    return Config(
        Pipeline,
        corpus=Partial(
            stages.corpus, files_below=corpus, max_bytes=8_000_000, validation_fraction=0.04
        ),
        tokenizer=Partial(stages.tokenizer, corpus=output("corpus"), vocab_size=2048),
        instructions=Partial(stages.instructions, corpus=output("corpus"), sft=4000),
        pretrain=Partial(
            stages.pretrain,
            tokenizer=output("tokenizer"),
            corpus=output("corpus"),
            instructions=output("instructions"),
            model=Config(preset, preset_name),
            phases=[
                Config(
                    Phase,
                    name="usual",
                    steps=steps,
                    learning_rate=3e-3,
                    warmup=steps // 10,
                    final_ratio=0.4,
                    mixture=dict(MIXTURES["off"]),
                    **common,
                ),
                Config(
                    Phase,
                    name="enhancement",
                    steps=enhancement_steps,
                    learning_rate=1.2e-3,
                    final_ratio=0.1,
                    mixture=dict(MIXTURES[arm]),
                    **common,
                ),
            ],
            validation_tokens=8192,
            validate_every=max(1, steps // 5),
            checkpoint_every=steps,
            seed=seed,
        ),
        measure=Partial(
            stages.measure,
            model=output("pretrain"),
            tokenizer=output("tokenizer"),
            corpus=output("corpus"),
            arm=arm,
            tasks=256,
        ),
    )


def tiny(arm: str = "on", seed: int = 0, corpus: str | None = None) -> Config:
    """The same in a few steps."""
    config = experiment(arm=arm, seed=seed, corpus=corpus, steps=4, enhancement_steps=2)
    config.corpus.max_bytes, config.tokenizer.vocab_size = 1_000_000, 1024
    sizes = config.instructions
    sizes.sft, sizes.preference_pairs, sizes.prompts, sizes.eval_tasks = 400, 200, 100, 20
    config.pretrain.enhancement_tasks = 200
    config.pretrain.validation_tokens = config.measure.max_tokens = 1024
    config.measure.tasks = 8
    return config
