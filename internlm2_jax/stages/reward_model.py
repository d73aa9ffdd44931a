"""The conditional reward model: one model, the system prompt names the preference domain.

InternLM2 section 4.2.1: started from the SFT model with the output layer replaced by a randomly
drawn linear map to one number, read at a reward token after the conversation; focal ranking loss
and a log-barrier; batches of a fixed number of tokens, cosine 1e-5 to 5e-6, weight decay 0.01.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from internlm2_jax import files
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.losses.preference import FocalGradient, Outside
from internlm2_jax.models.build import build, swap_head
from internlm2_jax.rlhf.scoring import Pair, PairSource, Scorer, accuracy, measure_domains
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.checkpoint import load_model, save_model_json
from internlm2_jax.train.loop import fit
from internlm2_jax.train.objectives import reward_model_loss
from internlm2_jax.train.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class RewardTraining:
    """How a reward model is trained, at first and when it is patched.

    `tokens_per_batch` (16384 in the report) counts padding: pairs per batch are tokens_per_batch /
    (2 row_length). The last five go to losses.preference.conditional_reward_loss.
    """

    steps: int
    row_length: int
    tokens_per_batch: int
    learning_rate: float
    final_ratio: float = 0.5
    warmup: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    validate_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 10
    gamma: float = 2.0
    barrier_weight: float = 0.02
    bound: float = 5.0
    focal_gradient: FocalGradient = "through"
    outside: Outside = "linear"


def reward_model(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    base: Path,
    training: RewardTraining,
    seed: int = 0,
) -> None:
    """Trains the reward model from the SFT stage `base` on `instructions`/preferences.jsonl."""
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    pairs = files.read_jsonl(instructions / "preferences.jsonl")
    base_model, base_params = load_model(base)
    model = build(base_model.cfg, head="scalar")
    train_pairs(
        folder,
        model,
        swap_head(base_params, model.init(jax.random.key(seed))["head"]),
        vocabulary,
        {"pairs": (PairSource(pairs, vocabulary, training.row_length), 1.0)},
        held_out=files.read_jsonl(instructions / "preferences_validation.jsonl"),
        training=training,
        seed=seed,
        label="reward model",
    )


def train_pairs(
    folder: Path,
    model: Any,
    params: Any,
    vocabulary: Tokenizer,
    sources: Mapping[str, tuple[PairSource, float]],
    *,
    held_out: Sequence[Pair],
    training: RewardTraining,
    seed: int,
    label: str,
) -> None:
    """Trains a scalar-head model on {name: (pairs, weight)} and measures it per domain.

    `params` are donated to the training state: do not use them afterwards.
    """
    batches = Batches(
        {name: source for name, (source, _) in sources.items()},
        {name: weight for name, (_, weight) in sources.items()},
        batch_size=max(1, training.tokens_per_batch // (2 * training.row_length)),
        seed=seed,
    )
    schedule = optimizers.warmup_cosine(
        training.learning_rate,
        training.steps,
        warmup=training.warmup,
        final_ratio=training.final_ratio,
    )
    optimizer = optimizers.adamw(
        schedule, b2=0.999, weight_decay=training.weight_decay, clip_norm=training.clip_norm
    )
    loss = reward_model_loss(
        model,
        gamma=training.gamma,
        barrier_weight=training.barrier_weight,
        bound=training.bound,
        focal_gradient=training.focal_gradient,
        outside=training.outside,
    )
    step_fn = make_train_step(loss, optimizer)
    scorer = Scorer(model, vocabulary, training.row_length)
    watched = held_out[:: max(1, len(held_out) // 128)]

    def train(step: int, state: dict[str, Any], rows: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        state, values = step_fn(state, rows)
        return state, {**values, "learning_rate": schedule(step)}

    def validate(done: int, state: dict[str, Any]) -> dict[str, Any]:
        return {"accuracy": accuracy(scorer.pairs(state["params"], watched))}

    state = fit(
        folder,
        init_state(params, optimizer),
        train,
        steps=training.steps,
        label=label,
        batch=lambda step, skipped: batches(step + skipped),
        shown=("loss", "accuracy"),
        log_every=training.log_every,
        validate=validate,
        validate_every=training.validate_every,
        checkpoint_every=training.checkpoint_every,
    )
    save_model_json(folder, model.cfg, "scalar")
    measured = measure_domains(scorer, state["params"], held_out)
    sizes = {name: len(source) for name, (source, _) in sources.items()}
    files.write_json(folder / "result.json", {**measured, "pairs": sizes})
