"""A small pre-training to try one change on: a corpus of 4 MB, 0.3M parameters, one WSD phase.

Needs   : nothing; the corpus is what every machine has (sources and documentation), or --corpus DIR
Mesh    : one CPU device
Expect  : see experiments/notebooks/ablation.py
Run     : internlm2 run experiments/ablations/small.py
          internlm2 run experiments/ablations/small.py --sweep learning_rate=1e-3,4e-3 --seeds 3
"""

from __future__ import annotations

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Output, Phase, Pipeline


def experiment(
    seed: int = 0,
    corpus: str | None = None,
    learning_rate: float = 4e-3,
    schedule: str = "wsd",
    steps: int = 300,
    width: int = 96,
) -> Config:
    """One phase over code and text. `seed` is of the model and the order of its data alone, so that
    runs of several seeds share one corpus and one tokenizer."""
    decay = {"decay": "sqrt", "decay_steps": steps // 5} if schedule == "wsd" else {}
    return Config(
        Pipeline,
        corpus=Partial(
            stages.corpus, files_below=corpus, max_bytes=4_000_000, validation_fraction=0.05
        ),
        tokenizer=Partial(stages.tokenizer, corpus=Config(Output, "corpus"), vocab_size=1024),
        pretrain=Partial(
            stages.pretrain,
            tokenizer=Config(Output, "tokenizer"),
            model=Config(
                preset,
                "tiny",
                num_layers=2,
                embed_dim=width,
                head_dim=width // 4,
                mlp_dim=width * 8 // 3,
            ),
            phases=[
                Config(
                    Phase,
                    name="only",
                    steps=steps,
                    sequence_length=128,
                    batch_size=8,
                    rope_theta=10_000.0,
                    learning_rate=learning_rate,
                    schedule=schedule,
                    warmup=steps // 10,
                    final_ratio=0.1,
                    mixture={"code": 0.5, "text": 0.5},
                    **decay,
                )
            ],
            validation_tokens=8192,
            validate_every=max(1, steps // 10),
            checkpoint_every=steps,
            seed=seed,
        ),
    )


def tiny(seed: int = 0, corpus: str | None = None, learning_rate: float = 4e-3) -> Config:
    """The same in four steps."""
    config = experiment(seed=seed, corpus=corpus, learning_rate=learning_rate, steps=4, width=64)
    config.corpus.max_bytes = 500_000
    config.tokenizer.vocab_size = 512
    config.pretrain.validation_tokens = 1024
    config.pretrain.phases[0].decay_steps = 2
    return config
