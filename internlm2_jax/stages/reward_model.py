"""The conditional reward model: one model, the system prompt names the preference domain.

InternLM2 section 4.2.1: started from the SFT model with the output layer replaced by a randomly
drawn linear map to one number, read at a reward token after the conversation; focal ranking loss
and a log-barrier; batches of a fixed number of tokens, cosine 1e-5 to 5e-6, weight decay 0.01.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from internlm2_jax import files, sharding
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.preferences import DOMAINS
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.losses.preference import RewardLoss
from internlm2_jax.models.build import build, swap_head
from internlm2_jax.models.remat import Remat
from internlm2_jax.rlhf.pairs import Pair, PairSource, TooLong, sides_of
from internlm2_jax.rlhf.scoring import Scorer, accuracy, measure_domains, save_domains
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.checkpoint import load_model, save_model_json
from internlm2_jax.train.loop import fit
from internlm2_jax.train.objectives import reward_model_loss
from internlm2_jax.train.speed import Work
from internlm2_jax.train.step import init_state, make_train_step

HeadInit = Literal["random", "zero"]
INTERNLM2 = RewardLoss()
WATCHED = 128  # held-out pairs that are ranked while training


@dataclasses.dataclass(frozen=True)
class RewardTraining:
    """How a reward model is trained, at first and when it is patched.

    Attributes:
        learning_rate: peak; falls to `final_ratio` of it (1e-5 to 5e-6 in the report).
        steps: by default as many as `epochs` passes over the first source of pairs take.
        row_length: tokens of a packed row, both sides of every pair in it.
        tokens_per_batch: in all rows of a step (16384 in the report).
        max_length: the most tokens of one sequence (8192 in the report); default: half a row.
        too_long: what becomes of pairs with a longer one: "drop" or "cut".
        loss: ranking loss and penalty (losses/preference.py).
        layout: the mesh (sharding.py); rows are not cut, so no `context`.
    """

    learning_rate: float
    row_length: int
    tokens_per_batch: int
    steps: int | None = None
    epochs: float = 1.0
    max_length: int | None = None
    too_long: TooLong = "drop"
    final_ratio: float = 0.5
    warmup: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    validate_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 10
    loss: RewardLoss = INTERNLM2
    layout: str = ""
    remat: Remat = "full"

    @property
    def longest(self) -> int:
        return self.row_length // 2 if self.max_length is None else self.max_length

    @property
    def rows(self) -> int:
        """Rows of a batch. Errors: UserError when a batch is less than one."""
        rows = self.tokens_per_batch // self.row_length
        if rows < 1:
            raise UserError(
                f"tokens_per_batch is {self.tokens_per_batch}, less than a row of "
                f"{self.row_length}; raise it or lower row_length"
            )
        return rows

    def fits(self, pair: Pair, vocabulary: Tokenizer, domains: Mapping) -> bool:
        """Whether `source` keeps the pair."""
        return sides_of(pair, vocabulary, domains, self.longest, self.too_long)[0] is not None

    def source(self, pairs: Sequence[Pair], vocabulary: Tokenizer, domains: Mapping) -> PairSource:
        return PairSource(
            pairs,
            vocabulary,
            self.row_length,
            domains=domains,
            max_length=self.max_length,
            too_long=self.too_long,
        )


def reward_model(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    base: Path,
    training: RewardTraining,
    domains: Mapping[str, str] = DOMAINS,
    head_init: HeadInit = "random",
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
) -> None:
    """Trains the reward model from the SFT stage `base` on `instructions`/preferences.jsonl.

    Args:
        domains: system prompt of each domain; empty ones make an unconditional model.
        shares: of every batch, for pairs of some kinds ("kind" of a pair); all others take the
            rest. Without it a pair counts as often as any.
        head_init: "random" as in the report, or "zero" as in xtuner.
    """
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    pairs = files.read_jsonl(instructions / "preferences.jsonl")
    with sharding.use(training.layout):
        model, params = with_fresh_head(base, head_init, seed)
    train_pairs(
        folder,
        model,
        params,
        vocabulary,
        {
            name: (training.source(group, vocabulary, domains), share)
            for name, (group, share) in _by_kind(pairs, shares or {}).items()
        },
        held_out=files.read_jsonl(instructions / "preferences_validation.jsonl"),
        domains=domains,
        training=training,
        seed=seed,
        label="reward model",
    )


def _by_kind(
    pairs: Sequence[Pair], shares: Mapping[str, float]
) -> dict[str, tuple[list[Pair], float]]:
    """Pairs by the sources that batches are mixed of, and the share of each."""
    rest = 1 - sum(shares.values())
    groups = {"pairs": ([p for p in pairs if p.get("kind") not in shares], rest)}
    groups |= {k: ([p for p in pairs if p.get("kind") == k], s) for k, s in shares.items()}
    for name, (group, share) in groups.items():
        if bool(group) != (share > 0):
            raise UserError(
                f"shares: {name} has {len(group)} pairs and {share:.3g} of a batch; shares are of "
                "kinds that there are, above 0, and leave something for the others"
            )
    return {name: found for name, found in groups.items() if found[0]}


def with_fresh_head(stage: Path, head_init: HeadInit, seed: int) -> tuple[Any, Any]:
    """(model, parameters) of a stage's trunk with a new head of one number, on the mesh in use."""
    if head_init not in get_args(HeadInit):
        raise UserError(f"head_init is {head_init!r}; it is one of {', '.join(get_args(HeadInit))}")
    base_model, base_params = load_model(stage)
    model = build(base_model.cfg, head="scalar")
    head = sharding.create(
        lambda key: model.init(key)["head"], model.axes["head"], jax.random.key(seed)
    )
    if head_init == "zero":
        head = jax.tree.map(jnp.zeros_like, head)
    return model, swap_head(base_params, head)


def train_pairs(
    folder: Path,
    model: Any,
    params: Any,
    vocabulary: Tokenizer,
    sources: Mapping[str, tuple[PairSource, float]],
    *,
    held_out: Sequence[Pair],
    domains: Mapping[str, str],
    training: RewardTraining,
    seed: int,
    label: str,
) -> None:
    """Trains a scalar-head model on {name: (pairs, weight)} and measures it per domain.

    `params` are donated to the training state: do not use them afterwards.
    """
    rows, mesh = training.rows, sharding.Layout.parse(training.layout)
    if mesh.context > 1:
        raise UserError(f"{label}: a layout with context={mesh.context} cuts rows; leave it out")
    mesh.check(model.axes, model.abstract, batch=rows, length=training.row_length)
    batches = Batches(
        {name: source for name, (source, _) in sources.items()},
        {name: weight for name, (_, weight) in sources.items()},
        batch_size=rows,
        seed=seed,
    )
    steps = training.steps
    if steps is None:
        name, (first, _) = next(iter(sources.items()))
        steps = math.ceil(training.epochs * len(first) / (rows * batches.weights[name]))
    schedule = optimizers.warmup_cosine(
        training.learning_rate, steps, warmup=training.warmup, final_ratio=training.final_ratio
    )
    optimizer = optimizers.adamw(
        schedule, b2=0.999, weight_decay=training.weight_decay, clip_norm=training.clip_norm
    )
    loss = reward_model_loss(model, training.loss, training.remat)
    step_fn = make_train_step(loss, optimizer)
    scorer = Scorer(model, vocabulary, training.longest, domains=domains)
    watched = held_out[:: max(1, len(held_out) // WATCHED)]
    tokens = rows * training.row_length

    def train(step: int, state: dict[str, Any], rows: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        state, values = step_fn(state, rows)
        return state, {**values, "learning_rate": schedule(step)}

    def validate(done: int, state: dict[str, Any]) -> dict[str, Any]:
        return {"accuracy": accuracy(scorer.pairs(state["params"], watched))}

    with sharding.use(training.layout):
        state = fit(
            folder,
            init_state(params, optimizer),
            train,
            steps=steps,
            label=label,
            batch=lambda step, skipped: sharding.place_rows(batches(step + skipped)),
            work=lambda step: Work(tokens, tokens * model.cfg.train_flops(training.row_length)),
            shown=("loss", "accuracy"),
            log_every=training.log_every,
            validate=validate,
            validate_every=training.validate_every,
            checkpoint_every=training.checkpoint_every,
        )
        measured = measure_domains(scorer, state["params"], held_out)
    save_model_json(folder, model.cfg, "scalar")
    save_domains(folder, domains)
    files.write_json(
        folder / "result.json",
        {
            **measured,
            "pairs": {name: len(source.pairs) for name, (source, _) in sources.items()},
            "too_long": {name: source.too_long for name, (source, _) in sources.items()},
            "fill_rate": {name: source.fill_rate for name, (source, _) in sources.items()},
            "tokens_per_batch": tokens,
            "steps": steps,
        },
    )
