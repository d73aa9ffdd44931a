"""Supervised fine-tuning in ChatML, loss on the assistant's turns only (InternLM2 section 4.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internlm2_jax import distributed, files, sharding
from internlm2_jax.data import chat
from internlm2_jax.data.packing import ExampleSource
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.models.remat import Remat
from internlm2_jax.plan.analytic import train_flops
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.checkpoint import load_model, save_model_json
from internlm2_jax.train.loop import fit
from internlm2_jax.train.objectives import evaluate_loss, language_model_loss
from internlm2_jax.train.speed import Work
from internlm2_jax.train.step import init_state, make_train_step


def conversations(path: Path, vocabulary: Tokenizer, row_length: int) -> ExampleSource:
    """Packed rows of a JSONL file of {"messages": [...]}; whole conversations, never cut."""
    rendered = [chat.render(row["messages"], vocabulary) for row in files.read_jsonl(path)]
    return ExampleSource([(r.ids, r.loss_mask) for r in rendered], row_length)


@distributed.collective
def sft(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    base: Path,
    steps: int,
    batch_size: int,
    row_length: int,
    learning_rate: float,
    warmup: int = 10,
    final_ratio: float = 0.1,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    layout: str = "",
    remat: Remat = "full",
    seed: int = 0,
    validation_batches: int = 8,
    validate_every: int = 100,
    checkpoint_every: int = 100,
    log_every: int = 10,
) -> None:
    """Fine-tunes the model of stage `base` on `instructions`/sft.jsonl.

    The report trains one epoch at a peak of 4e-5; a small model wants more, so both are fields.
    `layout` is the mesh (sharding.py), `remat` what a block keeps for its gradient.
    """
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    source = conversations(instructions / "sft.jsonl", vocabulary, row_length)
    held_out = conversations(instructions / "sft_validation.jsonl", vocabulary, row_length)
    batches = Batches({"sft": source}, {"sft": 1.0}, batch_size=batch_size, seed=seed)
    fixed = Batches({"sft": held_out}, {"sft": 1.0}, batch_size=batch_size, seed=seed)
    rows = [fixed(i) for i in range(validation_batches)]

    with sharding.use(layout):
        model, params = load_model(base)
    sharding.Layout.parse(layout).check(model.axes, model.abstract, batch=batch_size)
    schedule = optimizers.warmup_cosine(
        learning_rate, steps, warmup=warmup, final_ratio=final_ratio
    )
    optimizer = optimizers.adamw(schedule, weight_decay=weight_decay, clip_norm=clip_norm)
    step_fn = make_train_step(language_model_loss(model, remat=remat), optimizer)
    measure = evaluate_loss(model)

    def train(step: int, state: dict[str, Any], rows: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        state, values = step_fn(state, rows)
        return state, {**values, "learning_rate": schedule(step)}

    def validate(done: int, state: dict[str, Any]) -> dict[str, Any]:
        return {"loss": measure(state["params"], map(sharding.place_rows, rows))}

    tokens = batch_size * row_length
    with sharding.use(layout):
        state = fit(
            folder,
            init_state(params, optimizer),
            train,
            steps=steps,
            label="sft",
            batch=lambda step, skipped: sharding.place_rows(batches(step + skipped)),
            work=lambda step: Work(tokens, tokens * train_flops(model.cfg, row_length)),
            log_every=log_every,
            validate=validate,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
        )
        final = validate(steps, state)
    if not distributed.is_first():
        return
    save_model_json(folder, model.cfg, "lm")
    files.write_json(
        folder / "result.json",
        {
            "validation_loss": final["loss"],
            "rows": len(source),
            "epochs": steps * batch_size / len(source),
        },
    )
