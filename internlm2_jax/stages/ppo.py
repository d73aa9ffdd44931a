"""One round of online RLHF by PPO (InternLM2 section 4.2.3).

Four models of one size: the actor and the critic are trained, the reference (the SFT model) and
the reward model are frozen. The critic starts from the reward model without its head and is warmed
up while the actor waits. The domain of a prompt picks the reward model's system prompt, which no
other model sees. A share of pre-training loss keeps the actor from forgetting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internlm2_jax import files
from internlm2_jax.data import chat
from internlm2_jax.data.manifest import load_split
from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.tasks import Task, check
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import swap_head
from internlm2_jax.rlhf import kl, rollout
from internlm2_jax.rlhf.ppo import PPOConfig, State, Updates
from internlm2_jax.rlhf.scoring import Scorer
from internlm2_jax.train.checkpoint import load_model, save_model_json
from internlm2_jax.train.loop import fit


class Prompts:
    """Rollout prompts in a seeded order: `prompts(iteration)` is a pure function of its number.

    Rows are {"messages", "domain", "task"}; those over `longest` tokens are left out and counted.
    """

    def __init__(
        self,
        rows: Sequence[Mapping],
        vocabulary: Tokenizer,
        *,
        longest: int,
        batch_size: int,
        seed: int,
    ):
        rendered = [
            (row, chat.render(row["messages"], vocabulary, add_generation_prompt=True).ids)
            for row in rows
        ]
        self._rows = [(row, ids) for row, ids in rendered if len(ids) <= longest]
        self.too_long = len(rendered) - len(self._rows)
        self._batch, self._seed = batch_size, seed
        if len(self._rows) < batch_size:
            raise UserError(
                f"{len(self._rows)} prompts fit {longest} tokens, fewer than a batch of "
                f"{batch_size}; raise prompt_length or lower batch_size"
            )

    def __call__(self, iteration: int) -> tuple[list[Mapping], list[list[int]]]:
        epoch, i = divmod(iteration, len(self._rows) // self._batch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        chosen = [self._rows[j] for j in order[i * self._batch : (i + 1) * self._batch]]
        return [row for row, _ in chosen], [ids for _, ids in chosen]


def ppo(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    actor: Path,
    reference: Path,
    reward: Path,
    iterations: int,
    batch_size: int,
    prompt_length: int,
    max_new_tokens: int,
    reward_row_length: int,
    config: PPOConfig,
    warmup_iterations: int = 50,
    pretrain_mixture: Mapping[str, float],
    pretrain_row_length: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    round_number: int = 1,
    seed: int = 0,
    checkpoint_every: int = 10,
    samples_every: int = 10,
    samples_kept: int = 8,
) -> None:
    """Trains the model of stage `actor` against the reward model of stage `reward`.

    The critic alone learns for `warmup_iterations` (50 in the report). Pre-training rows make up
    half as many tokens as the rollouts. The report samples at top_p 0.9, which makes the sampler's
    distribution another than the trainer's; the default here is 1, so that the ratio at the first
    update is 1.
    """
    # ---------------------------------------------------- models and prompts
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    model, actor_params = load_model(actor)
    _, reference_params = load_model(reference)
    reward_model, reward_params = load_model(reward)
    scorer = Scorer(reward_model, vocabulary, reward_row_length, batch_size)
    prompts = Prompts(
        files.read_jsonl(instructions / "prompts.jsonl"),
        vocabulary,
        longest=prompt_length,
        batch_size=batch_size,
        seed=seed,
    )
    half = batch_size * (prompt_length + max_new_tokens) // (2 * pretrain_row_length)
    pretrain_batches = _pretrain_batches(
        tokenizer / "tokens", pretrain_mixture, pretrain_row_length, max(1, half), seed
    )
    updates = Updates(model, reward_model, config)
    fresh_head = reward_model.init(jax.random.key(seed))["head"]

    # ------------------------------------------------------------- iteration
    def iterate(iteration: int, state: State, _: None) -> tuple[State, dict[str, Any]]:
        rows, ids = prompts(iteration)
        sampled = rollout.sample(
            model,
            state["params"],
            ids,
            prompt_length=prompt_length,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p),
            seed=int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0] >> 1),
            stop_ids=(vocabulary.eos_id, vocabulary.im_end_id),
            pad_id=vocabulary.pad_id,
        )
        texts = [vocabulary.decode(response) for response in sampled.responses]
        judged = [(r["domain"], r["messages"], t) for r, t in zip(rows, texts, strict=True)]
        scores = scorer(reward_params, judged)
        reference_logprobs, values = updates.assess(
            reference_params, state["critic"], sampled.tokens
        )
        advantages, returns = updates.estimate(
            scores, sampled.logprobs, reference_logprobs, values, sampled.mask, sampled.finished
        )
        batch = {
            "tokens": sampled.tokens,
            "mask": sampled.mask,
            "logprobs": sampled.logprobs,
            "advantages": np.asarray(advantages),
            "returns": np.asarray(returns),
        }
        warming = iteration < warmup_iterations
        measured: list[dict[str, Any]] = []
        for number, part in enumerate(updates.minibatches(batch)):
            state, values_of = updates.update_critic(state, part)
            if not warming:
                count = config.epochs * config.minibatches
                extra = pretrain_batches(iteration * count + number)
                state, more = updates.update_actor(state, part, extra)
                values_of = {**values_of, **more}
            measured.append(values_of)

        k3 = kl.k3(jnp.asarray(sampled.logprobs), reference_logprobs)
        metrics: dict[str, Any] = {
            "round": round_number,
            "warmup": warming,
            "reward": float(scores.mean()),
            "reward_std": float(scores.std()),
            "kl": float(jnp.where(sampled.mask, k3, 0.0).sum() / batch_size),
            "response_length": float(sampled.lengths.mean()),
            "truncated": float(1 - sampled.finished.mean()),
            **_task_accuracy(rows, texts),
            **{k: float(np.mean([m[k] for m in measured])) for k in measured[0]},
            # before any update of the iteration: 1 when sampler and trainer agree
            **({} if warming else {"ratio_at_start": float(measured[0]["ratio"])}),
        }
        if iteration % samples_every == 0 or iteration == iterations - 1:
            metrics["samples"] = [
                {
                    "round": round_number,
                    "domain": domain,
                    "prompt": messages[-1]["content"],
                    "response": text,
                    "score": float(score),
                }
                for (domain, messages, text), score in zip(judged, scores, strict=True)
            ][:samples_kept]
        return state, metrics

    critic = swap_head(reward_params, fresh_head)
    fit(
        folder,
        updates.init(actor_params, critic),
        iterate,
        steps=iterations,
        label=f"PPO round {round_number}",
        unit="iteration",
        shown=("reward", "kl", "response_length"),
        log_every=1,
        checkpoint_every=checkpoint_every,
    )
    save_model_json(folder, model.cfg, "lm")
    rows = files.read_jsonl(folder / "metrics.jsonl")
    files.write_json(
        folder / "result.json",
        {
            "round": round_number,
            "iterations": iterations,
            "prompts_too_long": prompts.too_long,
            "reward_first": _mean(rows[:3], "reward"),
            "reward_last": _mean(rows[-3:], "reward"),
            "kl_last": _mean(rows[-3:], "kl"),
        },
    )


def _pretrain_batches(
    tokens: Path, mixture: Mapping[str, float], row_length: int, batch_size: int, seed: int
) -> Batches:
    """Pre-training rows of the sources that the corpus has."""
    found = load_split(tokens, "train")
    weights = {name: weight for name, weight in mixture.items() if name in found}
    if not weights:
        raise UserError(
            f"pretrain_mixture names {', '.join(mixture)} but the corpus has "
            f"{', '.join(found)}; change the mixture"
        )
    rows = {name: PackedSource(found[name], row_length) for name in weights}
    return Batches(rows, weights, batch_size=batch_size, seed=seed)


def _task_accuracy(rows: Sequence[Mapping], texts: Sequence[str]) -> dict[str, float]:
    """Share of the verifiable prompts answered rightly; nothing when there are none."""
    checked = [check(Task(**r["task"]), t) for r, t in zip(rows, texts, strict=True) if r["task"]]
    return {"task_accuracy": float(np.mean(checked))} if checked else {}


def _mean(rows: Sequence[Mapping], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
