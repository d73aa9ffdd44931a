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
from internlm2_jax.stages import Output, Pipeline
from internlm2_jax.stages.short import short_pretrain

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
        pretrain=short_pretrain(
            output("tokenizer"),
            Config(preset, preset_name),
            {"code": 0.2, "text": 0.8},
            steps=steps,
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
