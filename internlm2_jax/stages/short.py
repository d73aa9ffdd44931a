"""What the ablations of pre-training share: one short phase of a small model."""

from __future__ import annotations

from collections.abc import Mapping

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.stages import Output, Phase


def short_pretrain(
    tokenizer: Output,
    model: Config,
    mixture: Mapping[str, float],
    *,
    steps: int,
    seed: int,
    rows: int = 8,
) -> Config:
    """`stages.pretrain` in one phase of `steps` steps of `rows` rows of 128 tokens."""
    return Partial(
        stages.pretrain,
        tokenizer=tokenizer,
        model=model,
        phases=[
            Config(
                Phase,
                name="only",
                steps=steps,
                sequence_length=128,
                batch_size=rows,
                rope_theta=10_000.0,
                learning_rate=3e-3,
                warmup=steps // 10,
                final_ratio=0.1,
                mixture=dict(mixture),
            )
        ],
        validation_tokens=8192,
        validate_every=max(1, steps // 5),
        checkpoint_every=steps,
        seed=seed,
    )
