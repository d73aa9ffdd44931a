"""Which vocabulary for Chinese? Bytes per token, and loss per byte, across tokenizers.

Each arm has its own tokenizer and a model of one width trained on the same number of tokens; bits
per byte compare them. An arm is a size of vocabulary, trained on the corpus, or the path of a
tokenizer.model, such as InternLM2's.

Needs   : a folder with Chinese text: --corpus DIR (a folder of text files)
Mesh    : one CPU device
Expect  : see docs/ablations.md
Run     : internlm2 run experiments/ablations/tokenizer_chinese.py --corpus DIR \\
              --sweep vocabulary=2048,4096,8192 --seeds 3
"""

from __future__ import annotations

import functools

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Output, Phase, Pipeline

output = functools.partial(Config, Output)


def experiment(
    vocabulary: int | str = 4096,
    seed: int = 0,
    corpus: str | None = None,
    steps: int = 300,
    preset_name: str = "demo",
) -> Config:
    """`seed` is of the model and the order of its data, so that runs share corpus and tokenizer."""
    size = {"vocab_size": vocabulary} if isinstance(vocabulary, int) else {"model": vocabulary}
    return Config(
        Pipeline,
        corpus=Partial(
            stages.corpus, files_below=corpus, max_bytes=8_000_000, validation_fraction=0.04
        ),
        tokenizer=Partial(stages.tokenizer, corpus=output("corpus"), **size),
        pretrain=Partial(
            stages.pretrain,
            tokenizer=output("tokenizer"),
            model=Config(preset, preset_name),
            phases=[
                Config(
                    Phase,
                    name="only",
                    steps=steps,
                    sequence_length=128,
                    batch_size=8,
                    rope_theta=10_000.0,
                    learning_rate=3e-3,
                    warmup=steps // 10,
                    final_ratio=0.1,
                    mixture={"code": 0.2, "text": 0.8},
                )
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
            arm=f"vocabulary {vocabulary}",
            by_script=True,
        ),
    )


def tiny(vocabulary: int | str = 4096, seed: int = 0, corpus: str | None = None) -> Config:
    """The same in four steps."""
    config = experiment(vocabulary=vocabulary, seed=seed, corpus=corpus, steps=4)
    config.corpus.max_bytes = 2_000_000
    config.pretrain.validation_tokens = config.measure.max_tokens = 1024
    return config
