"""Supervised fine-tuning in ChatML, loss on the assistant's turns only (InternLM2 section 4.1).

Conversations are packed whole, and those of a row do not see each other. Long documents of
pre-training (books, repositories) may keep a share of the rows, so that the length that was learnt
stays (section 4.3). All weights are trained, or LoRA adapters beside them.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from internlm2_jax import distributed, files, sharding
from internlm2_jax.data import chat, conversations, mixture
from internlm2_jax.data.conversations import Format
from internlm2_jax.data.packing import ExampleSource
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.models import lora as adapters
from internlm2_jax.models.config import LoRA
from internlm2_jax.models.remat import Remat
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.checkpoint import load_model, save_model, save_model_json
from internlm2_jax.train.loop import fit
from internlm2_jax.train.objectives import by_source, evaluate_loss, language_model_loss
from internlm2_jax.train.speed import Work
from internlm2_jax.train.step import init_state, make_train_step

SFT = "sft"
MERGED = "merged"  # folder in the stage's, with the model that LoRA has made


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Where conversations come from and what of them is learnt.

    Attributes:
        files: of conversations in any format of data/conversations.py; seqio:MODULE:TASK.
        validation_files: held-out ones; with none, `validation_share` of `files` is held out, by
            the hash of the conversation.
        form: format of the files, "auto" tells it by their fields.
        skip_bad: leave bad records out, and count them, instead of refusing the files.
        learn: "all" answers, or the "last" one of each conversation.
        too_long: "drop" or "truncate" conversations of more tokens than a row has.
    """

    files: Sequence[str]
    validation_files: Sequence[str] = ()
    validation_share: float = 0.02
    form: Format = "auto"
    skip_bad: bool = False
    learn: chat.Learn = "all"
    too_long: str = "drop"

    def load(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
        """(training, held-out conversations, bad records left out)."""
        rows, bad = conversations.read(self.files, self.form)
        if self.validation_files:
            held_out, worse = conversations.read(
                self.validation_files, self.form, split="validation"
            )
            bad += worse
        else:
            held_out = [row for row in rows if _held_out(row, self.validation_share)]
            rows = [row for row in rows if not _held_out(row, self.validation_share)]
        if bad and not self.skip_bad:
            raise UserError(conversations.explain(bad, len(rows) + len(held_out) + len(bad)))
        for name, found in (("learn from", rows), ("validate with", held_out)):
            if not found:
                raise UserError(
                    f"{', '.join(self.files)}: no conversation to {name}; add some, or change "
                    "validation_share"
                )
        return rows, held_out, len(bad)

    def pack(
        self, rows: Sequence[Mapping], vocabulary: Tokenizer, row_length: int
    ) -> ExampleSource:
        """Packed rows; whole conversations, cut only where `too_long` says so."""
        rendered = [chat.render(row["messages"], vocabulary, learn=self.learn) for row in rows]
        return ExampleSource(
            [(r.ids, r.loss_mask) for r in rendered], row_length, too_long=self.too_long
        )


def _held_out(row: Mapping, share: float) -> bool:
    return zlib.crc32(files.json_bytes(row)) < share * 2**32


@distributed.collective
def sft(
    folder: Path,
    *,
    tokenizer: Path | str,
    base: Path | str,
    batch_size: int,
    row_length: int,
    learning_rate: float,
    instructions: Path | None = None,
    data: Conversations | None = None,
    steps: int | None = None,
    epochs: float = 1.0,
    warmup: int = 10,
    final_ratio: float = 0.1,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    lora: LoRA | None = None,
    pretrain_mixture: Mapping[str, float] | None = None,
    pretrain_share: float = 0.0,
    layout: str = "",
    remat: Remat = "full",
    seed: int = 0,
    validation_batches: int = 8,
    validate_every: int = 100,
    checkpoint_every: int = 100,
    log_every: int = 10,
) -> None:
    """Fine-tunes the model of stage `base` on `data`, or on sft.jsonl of stage `instructions`.

    The report trains one epoch at a peak of 4e-5; a small model wants more, so both are fields.

    Args:
        steps: by default as many as `epochs` passes over the conversations take.
        lora: train adapters only; the merged model is what later stages and exports find.
        pretrain_mixture, pretrain_share: sources of the tokenized corpus, named as in a phase of
            pre-training ("long/NAME": documents of at least half a row), and their share of the
            rows. The report keeps long data in the mix and does not say how much.
        layout: the mesh (sharding.py).
        remat: what a block keeps for its gradient.
    """
    # ------------------------------------------------------------------ data
    tokenizer, base = Path(tokenizer), Path(base)
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    data = data or _of_stage(instructions)
    train_rows, held_out_rows, bad = data.load()
    source = data.pack(train_rows, vocabulary, row_length)
    held_out = data.pack(held_out_rows, vocabulary, row_length)
    mesh = sharding.Layout.parse(layout)
    sources, weights = _mix(
        source, tokenizer, vocabulary, pretrain_mixture, pretrain_share, row_length, folder
    )
    batches = Batches(sources, weights, batch_size=batch_size, seed=seed)
    fixed = Batches({SFT: held_out}, batch_size=batch_size, seed=seed)
    rows = [fixed(i) for i in range(validation_batches)]
    if steps is None:
        steps = math.ceil(epochs * len(source) / (batch_size * weights[SFT]))

    # ----------------------------------------------------------------- model
    with sharding.use(layout):
        model, params = load_model(base)
    limit = model.cfg.length_limit
    if limit is not None and row_length > limit:
        raise UserError(
            f"row_length is {row_length} and the model of {base} has {limit} positions; lower it, "
            "or pre-train at that length first"
        )
    mesh.check(model.axes, model.abstract, batch=batch_size, length=row_length)
    schedule = optimizers.warmup_cosine(
        learning_rate, steps, warmup=warmup, final_ratio=final_ratio
    )
    optimizer = optimizers.adamw(schedule, weight_decay=weight_decay, clip_norm=clip_norm)
    trained = adapters.adapted(model, lora) if lora else model
    loss = language_model_loss(trained, remat=remat, num_sources=len(batches.names))
    step_fn = make_train_step(adapters.loss_of_adapters(loss) if lora else loss, optimizer)
    measure = evaluate_loss(trained)

    # -------------------------------------------------------------- training
    with sharding.use(layout):
        frozen = adapters.frozen(params, model.cfg) if lora else {}
        if lora:
            params = adapters.init(trained, jax.random.key(seed))

        def train(step: int, state: dict[str, Any], rows: Any) -> tuple[Any, dict[str, Any]]:
            state, values = step_fn(state, {"frozen": frozen, "rows": rows} if lora else rows)
            return state, {**by_source(values, batches.names), "learning_rate": schedule(step)}

        def validate(done: int, state: dict[str, Any]) -> dict[str, Any]:
            whole = adapters.join(frozen, state["params"]) if lora else state["params"]
            return {"loss": measure(whole, map(sharding.place_rows, rows))}

        tokens = batch_size * row_length
        state = fit(
            folder,
            init_state(params, optimizer),
            train,
            steps=steps,
            label=SFT,
            batch=lambda step, skipped: sharding.place_rows(batches(step + skipped)),
            work=lambda step: Work(tokens, tokens * model.cfg.train_flops(row_length)),
            log_every=log_every,
            validate=validate,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
        )
        final = validate(steps, state)
        if lora:
            _, whole = load_model(base)
            merged = adapters.merge(whole, state["params"], lora)
            save_model(folder / MERGED, model.cfg, "lm", merged)
    if not distributed.is_first():
        return
    save_model_json(folder, model.cfg, "lm", params=MERGED if lora else "")
    files.write_json(
        folder / "result.json",
        {
            "validation_loss": final["loss"],
            "conversations": len(train_rows),
            "bad_records": bad,
            "too_long": source.num_dropped,
            "truncated": source.num_truncated,
            "rows": len(source),
            "fill_rate": source.fill_rate,
            "shares": batches.weights,
            "epochs": steps * batch_size * weights[SFT] / len(source),
            "trained_params": sum(x.size for x in jax.tree.leaves(state["params"])),
        },
    )


def _of_stage(instructions: Path | None) -> Conversations:
    if instructions is None:
        raise UserError("sft needs conversations: give data, or the stage instructions")
    train, held_out = (str(instructions / f"{n}.jsonl") for n in ("sft", "sft_validation"))
    return Conversations(files=[train], validation_files=[held_out], form="messages")


def _mix(
    source: ExampleSource,
    tokenizer: Path,
    vocabulary: Tokenizer,
    wanted: Mapping[str, float] | None,
    share: float,
    row_length: int,
    folder: Path,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Sources of rows and their shares: the conversations, and what stays of pre-training."""
    if bool(wanted) != (share > 0) or not 0 <= share < 1:
        raise UserError(
            f"pretrain_share is {share} and pretrain_mixture names {len(wanted or {})} sources; "
            "give both, the share between 0 and 1, or neither"
        )
    sources: dict[str, Any] = {SFT: source}
    weights = {SFT: 1 - share}
    if wanted:
        rows = mixture.Rows(
            row_length,
            short_length=row_length,
            long_length=row_length // 2,
            folder=folder,
            writes=jax.process_index() == 0,
        )
        found = mixture.of_corpus(tokenizer / "tokens", vocabulary, wanted, rows)
        if absent := [name for name in wanted if name not in found]:
            raise UserError(
                f"pretrain_mixture names {', '.join(absent)}, of which the corpus has nothing; "
                "leave it out"
            )
        sources |= found
        weights |= {name: share * w / sum(wanted.values()) for name, w in wanted.items()}
    return sources, weights
