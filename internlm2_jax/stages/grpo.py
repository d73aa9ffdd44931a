"""Reinforcement learning from rewards that a program verifies (RLVR), by GRPO.

An iteration draws prompts, samples a group of responses to each from the one engine, has them
checked, and makes a few updates. A response that the machine failed to check is masked. Sampling is
at temperature 1 over the whole distribution: what the trainer's ratio assumes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internlm2_jax import files, sharding
from internlm2_jax.data import chat
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.rlhf import grpo as algorithm
from internlm2_jax.rlhf import kl, rollout
from internlm2_jax.rlhf.grpo import Group, GroupUpdates, GRPOConfig, State
from internlm2_jax.rlhf.verifiers import Checks, summary
from internlm2_jax.train.checkpoint import load_model, save_model_json
from internlm2_jax.train.loop import fit
from internlm2_jax.train.metrics import MetricsLog

# Sampler and trainer round differently; beyond this they compute different things.
MISMATCH = 0.1
PROBLEMS, HELD_OUT = "problems.jsonl", "problems_validation.jsonl"


class Problems:
    """Rows of {"messages" or "prompt", "check"} in a seeded order: a function of a position in it.

    Those over `longest` tokens are left out and counted. Errors: UserError on a row that cannot be
    read or checked, and when none is left.
    """

    def __init__(
        self, path: Path, vocabulary: Tokenizer, checks: Checks, *, longest: int, seed: int
    ) -> None:
        rows = files.read_jsonl(path)
        checks.validate(rows, str(path))
        rendered = [(row, _prompt(row, vocabulary, f"{path}:{i}")) for i, row in enumerate(rows, 1)]
        self._rows = [(row, ids) for row, ids in rendered if len(ids) <= longest]
        self.too_long, self._seed, self._epoch = len(rendered) - len(self._rows), seed, -1
        if not self._rows:
            raise UserError(f"{path}: no problem fits {longest} tokens; raise prompt_length")

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, start: int, count: int) -> tuple[list[Mapping], list[list[int]]]:
        """The rows and ids at `start` .. `start` + `count` - 1; each epoch has its own order."""
        chosen = []
        for position in range(start, start + count):
            epoch, i = divmod(position, len(self._rows))
            if epoch != self._epoch:
                generator = np.random.default_rng([self._seed, epoch])
                self._epoch, self._order = epoch, generator.permutation(len(self._rows))
            chosen.append(self._rows[self._order[i]])
        return [row for row, _ in chosen], [ids for _, ids in chosen]


def _prompt(row: Mapping, vocabulary: Tokenizer, where: str) -> list[int]:
    messages = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
    if not isinstance(messages[-1].get("content"), str):
        raise UserError(f'{where} has neither "messages" nor a "prompt" that is a text')
    return chat.render(messages, vocabulary, add_generation_prompt=True).ids


def grpo(
    folder: Path,
    *,
    tokenizer: Path,
    problems: Path,
    actor: Path,
    reference: Path | None = None,
    iterations: int,
    prompts_per_iteration: int,
    group_size: int,
    prompt_length: int,
    max_new_tokens: int,
    config: GRPOConfig,
    workers: int | None = None,
    maths_timeout: float = 5.0,
    layout: str = "",
    seed: int = 0,
    validate_every: int = 0,
    checkpoint_every: int = 10,
    samples_every: int = 10,
    samples_kept: int = 8,
) -> None:
    """Trains the model of stage `actor` on `problems`/problems.jsonl.

    reference: the stage that a KL is measured against; default: `actor`. Only read when
      `config.kl_coefficient` is not 0.
    workers: programs and answers that are checked at a time (default: processor cores).
    layout: the mesh (sharding.py), of rollouts, updates and the reference; rollouts are whole, so
      no `context`.
    validate_every: iterations between greedy pass rates on problems_validation.jsonl; 0 for never.
    """
    # ------------------------------------------------------ models and problems
    if group_size < 2:
        raise UserError(f"grpo: group_size is {group_size}; a group needs 2 or more to compare")
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    stops = (vocabulary.eos_id, vocabulary.im_end_id)
    _check_layout(layout, prompts_per_iteration * group_size, config.minibatches)
    with sharding.use(layout):
        model, params = load_model(actor)
        anchor = load_model(reference or actor)[1] if config.kl_coefficient else None
    updates = GroupUpdates(model, config, max_new_tokens)
    checks = Checks(workers=workers, maths_timeout=maths_timeout)
    fit_in = {"longest": prompt_length, "seed": seed}
    stream = Problems(problems / PROBLEMS, vocabulary, checks, **fit_in)
    held_out = None
    if validate_every:
        held_out = Problems(problems / HELD_OUT, vocabulary, checks, **fit_in)
    clock = _Timing(folder / "timing.jsonl")

    # ------------------------------------------------------------- iteration
    def iterate(iteration: int, state: State, _: None) -> tuple[State, dict[str, Any]]:
        seconds = {"rollout": 0.0, "scoring": 0.0, "update": 0.0}
        cursor = int(state["cursor"]["problems"])
        number = 0

        def draw(count: int) -> list[Group]:
            nonlocal cursor, number
            rows, ids = stream.take(cursor, count)
            cursor, number = cursor + count, number + 1
            start = time.monotonic()
            sampled = rollout.sample(
                model,
                state["params"],
                [prompt for prompt in ids for _ in range(group_size)],
                prompt_length=prompt_length,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature=1.0),
                seed=_seed(seed, iteration, number),
                stop_ids=stops,
                pad_id=vocabulary.pad_id,
            )
            seconds["rollout"] += time.monotonic() - start
            start = time.monotonic()
            texts = [vocabulary.decode(response) for response in sampled.responses]
            verdicts = checks([row for row in rows for _ in range(group_size)], texts)
            seconds["scoring"] += time.monotonic() - start
            return algorithm.grouped(rows, sampled, texts, verdicts, config, max_new_tokens)

        chosen, drawn, rounds = algorithm.collect(
            draw, prompts_per_iteration, config.dynamic_rounds
        )
        _refuse_nothing(drawn)

        start = time.monotonic()
        batch = algorithm.to_batch(chosen, config)
        metrics = _metrics(drawn, chosen, rounds)
        if anchor is not None:
            batch["reference"] = updates.logprobs(anchor, batch["tokens"])
            k3 = np.asarray(kl.k3(jnp.asarray(batch["logprobs"]), jnp.asarray(batch["reference"])))
            metrics["kl"] = float(np.where(batch["mask"], k3, 0.0).sum() / len(batch["tokens"]))
        learnt, measured = {k: state[k] for k in ("params", "opt_state")}, []
        parts = list(updates.minibatches(batch, _seed(seed, iteration, 0)))
        for part in parts:
            learnt, values = updates.update(learnt, part)
            measured.append(jax.device_get(values))
        if parts[0]["mask"].any():
            # before any update of the iteration: 1 when sampler and trainer agree
            metrics["ratio_at_start"] = float(measured[0]["ratio"])
            _refuse_mismatch(metrics["ratio_at_start"], iteration)
        metrics |= {k: float(np.mean([m[k] for m in measured])) for k in measured[0]}
        seconds["update"] = time.monotonic() - start

        if iteration % samples_every == 0 or iteration == iterations - 1:
            metrics["samples"] = _samples(chosen, samples_kept)
        clock(iteration, rounds=rounds, **seconds)
        return {**learnt, "cursor": {"problems": jnp.int32(cursor)}}, metrics

    def validate(done: int, state: State) -> dict[str, Any]:
        assert held_out
        rows, ids = held_out.take(0, len(held_out))
        out = engine.generate(
            model, state["params"], ids, max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0.0), stop_ids=stops, pad_to=prompt_length,
        )  # fmt: skip
        texts = [vocabulary.decode(response) for response in out.tokens]
        return {**summary(checks(rows, texts)), "problems": len(rows)}

    with checks, sharding.use(layout):
        fit(
            folder,
            {**updates.init(params), "cursor": {"problems": jnp.int32(0)}},
            iterate,
            steps=iterations,
            label="GRPO",
            unit="iteration",
            shown=("pass_rate", "zero_variance", "response_length"),
            log_every=1,
            validate=validate if validate_every else None,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
        )
    save_model_json(folder, model.cfg, "lm")
    files.write_json(folder / "result.json", _result(folder, iterations, stream))


class _Timing:
    """Rows of timing.jsonl: what depends on the clock and so stays out of metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self._log, self._begun = MetricsLog(path), False

    def __call__(self, iteration: int, **values: float) -> None:
        if not self._begun:  # rows from before a kill, of iterations that are repeated
            self._log.rewind(iteration)
        self._begun = True
        self._log.log(iteration + 1, **values)


def _check_layout(layout: str, rows: int, minibatches: int) -> None:
    """Errors: UserError when the layout cuts rows, or the responses do not divide over it."""
    mesh = sharding.Layout.parse(layout)
    if mesh.context > 1:
        raise UserError(f"grpo: a layout with context={mesh.context} cuts rows; leave it out")
    if rows % (minibatches * mesh.batch_ways):
        raise UserError(
            f"grpo: {rows} responses in {minibatches} minibatches do not divide over "
            f"{mesh.batch_ways} parts of the layout {layout!r}; change prompts_per_iteration, "
            "group_size, minibatches or the layout"
        )


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def _metrics(drawn: Sequence[Group], chosen: Sequence[Group], rounds: int) -> dict[str, Any]:
    """What is said of an iteration's rollouts; shares are of all that were drawn."""
    verdicts = [verdict for group in drawn for verdict in group.verdicts]
    valid = np.concatenate([group.valid for group in drawn])
    rewards = np.concatenate([group.rewards for group in drawn])[valid]
    lengths = np.concatenate([group.lengths for group in drawn])
    solved = [group.solved for group in drawn if group.valid.any()]
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        **summary(verdicts),
        "zero_variance": float(np.mean([not group.useful for group in drawn])),
        "all_right": float(np.mean(np.equal(solved, 1))),
        "all_wrong": float(np.mean(np.equal(solved, 0))),
        "rounds": rounds,
        "groups_drawn": len(drawn),
        "groups_useful": sum(group.useful for group in chosen),
        "response_length": float(lengths.mean()),
        "response_length_max": int(lengths.max()),
        "truncated": float(1 - np.concatenate([group.finished for group in drawn]).mean()),
        "entropy": -float(
            sum(np.where(g.mask, g.logprobs, 0.0).sum() for g in drawn) / max(1, lengths.sum())
        ),
    }


def _samples(chosen: Sequence[Group], kept: int) -> list[dict[str, Any]]:
    """A best and a worst response of each group, as far as there is room."""
    rows = []
    for group in chosen[: max(1, kept // 2)]:
        order = np.argsort(group.rewards, kind="stable")
        for i in dict.fromkeys((int(order[-1]), int(order[0]))):
            rows.append(
                {
                    "prompt": _asked(group.row),
                    "response": group.texts[i],
                    "score": float(group.rewards[i]),
                    "outcome": group.verdicts[i].outcome,
                    "detail": group.verdicts[i].detail,
                    "solved": group.solved,
                }
            )
    return rows


def _asked(row: Mapping) -> str:
    return row["messages"][-1]["content"] if row.get("messages") else row["prompt"]


def _refuse_nothing(drawn: Sequence[Group]) -> None:
    """Errors: UserError when not one response could be judged: the run would learn nothing."""
    if not any(group.valid.any() for group in drawn):
        why = drawn[0].verdicts[0].detail
        raise UserError(f"not one of the responses could be checked; the first because: {why}")


def _refuse_mismatch(ratio: float, iteration: int) -> None:
    if not abs(ratio - 1) < MISMATCH:
        raise UserError(
            f"GRPO iteration {iteration + 1}: before any update the policy's ratio to the sampler "
            f"is {ratio:.3f}, not 1: the engine and the trainer compute different models (cache "
            "type, rotation or precision); nothing can be learnt from such samples"
        )


def _result(folder: Path, iterations: int, stream: Problems) -> dict[str, Any]:
    rows = files.read_jsonl(folder / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    checked = [row for row in rows if row["split"] == "validation"]
    part = max(1, len(train) // 10)

    def mean(chosen: Sequence[Mapping], name: str) -> float:
        return float(np.mean([row[name] for row in chosen]))

    return {
        "iterations": iterations,
        "problems": len(stream),
        "problems_too_long": stream.too_long,
        "pass_rate_first": mean(train[:part], "pass_rate"),
        "pass_rate_last": mean(train[-part:], "pass_rate"),
        "zero_variance_last": mean(train[-part:], "zero_variance"),
        "infrastructure_errors": mean(train, "infrastructure_errors"),
        **({"held_out_pass_rate": checked[-1]["pass_rate"]} if checked else {}),
    }
