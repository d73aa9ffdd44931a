"""One round of online RLHF by PPO (InternLM2 section 4.2.3).

Four models of one size: the actor and the critic are trained, the reference (the SFT model) and
the reward model are frozen. The critic starts from the reward model without its head and is warmed
up while the actor waits. The domain of a prompt picks the reward model's system prompt, which no
other model sees. A share of pre-training loss keeps the actor from forgetting.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internlm2_jax import files, sharding
from internlm2_jax.data import mixture
from internlm2_jax.data.pipeline import Batches
from internlm2_jax.data.tasks import Task, check
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import swap_head
from internlm2_jax.rlhf import kl, rollout
from internlm2_jax.rlhf.config import Layouts
from internlm2_jax.rlhf.guards import Guards
from internlm2_jax.rlhf.ppo import PPOConfig, State, Updates
from internlm2_jax.rlhf.prompts import Prompts
from internlm2_jax.rlhf.scoring import Scorer, load_domains
from internlm2_jax.train.checkpoint import load_model, save_model_json
from internlm2_jax.train.loop import fit

_ONE_DEVICE, _GUARDS = Layouts(), Guards()
ALIKE = 1e-6  # scores of a group that differ by less are the same


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
    samples_per_prompt: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    layouts: Layouts = _ONE_DEVICE,
    guards: Guards = _GUARDS,
    round_number: int = 1,
    seed: int = 0,
    checkpoint_every: int = 10,
    samples_every: int = 10,
    samples_kept: int = 8,
) -> None:
    """Trains the model of stage `actor` against the reward model of stage `reward`.

    The critic alone learns for `warmup_iterations` (50 in the report). Pre-training rows make up
    half as many tokens as the rollouts; sources may be "long/NAME" (section 4.3). The report
    samples at top_p 0.9, which makes the sampler's distribution another than the trainer's; the
    default here is 1, so that the ratio at the first update is 1.

    Errors: guards.Diverged when the numbers say that something is wrong.
    """
    # ---------------------------------------------------- models and prompts
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    with layouts.use("actor"):
        model, actor_params = load_model(actor)
    with layouts.use("reference"):
        _, reference_params = load_model(reference)
    with layouts.use("reward"):
        reward_model, reward_params = load_model(reward)
    with layouts.use("critic"):
        shared = layouts.critic == layouts.reward
        trunk = reward_params if shared else load_model(reward)[1]
        head = sharding.create(
            lambda key: reward_model.init(key)["head"],
            reward_model.axes["head"],
            jax.random.key(seed),
        )
        critic = swap_head(trunk, head)
    _check_rows(layouts, batch_size, config.minibatches)
    domains = load_domains(reward)
    scorer = Scorer(reward_model, vocabulary, reward_row_length, batch_size, domains)
    prompts = Prompts(
        files.read_jsonl(instructions / "prompts.jsonl"),
        vocabulary,
        longest=prompt_length,
        batch_size=batch_size,
        seed=seed,
        samples=samples_per_prompt,
    )
    ways = sharding.Layout.parse(layouts.actor).batch_ways
    half = batch_size * (prompt_length + max_new_tokens) // (2 * pretrain_row_length)
    found = mixture.of_corpus(
        tokenizer / "tokens",
        vocabulary,
        pretrain_mixture,
        mixture.Rows(
            pretrain_row_length,
            short_length=pretrain_row_length,
            long_length=pretrain_row_length // 2,
            folder=folder,
        ),
    )
    pretrain_batches = Batches(
        found,
        {name: pretrain_mixture[name] for name in found},
        batch_size=-(-max(1, half) // ways) * ways,
        seed=seed,
    )
    updates = Updates(model, reward_model, config, layouts)
    label = f"PPO round {round_number}"
    history = _History(folder, guards.patience)

    # ------------------------------------------------------------- iteration
    def iterate(iteration: int, state: State, _: None) -> tuple[State, dict[str, Any]]:
        rows, ids = prompts(iteration)
        with layouts.use("actor"):
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
        with layouts.use("reward"):
            scores = scorer(reward_params, judged)
        reference_logprobs, values = updates.assess(
            reference_params, state["critic"], sampled.tokens
        )
        divergence = _divergence(sampled, reference_logprobs)
        coefficient = np.float32(state["control"]["kl_coefficient"])
        state, paid = updates.steer(state, scores, divergence["kl"].mean())
        advantages, returns = updates.estimate(
            paid,
            sampled.logprobs,
            reference_logprobs,
            values,
            sampled.mask,
            sampled.finished,
            coefficient,
        )
        batch = {
            "tokens": sampled.tokens,
            "mask": sampled.mask,
            "logprobs": sampled.logprobs,
            "reference": reference_logprobs,
            "values": values,
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

        # -------------------------------------------------------- what came of it
        means = {k: float(np.mean([float(m[k]) for m in measured])) for k in measured[0]}
        means.pop("log_ratio", None)
        groups = scores.reshape(-1, samples_per_prompt)
        metrics: dict[str, Any] = {
            "round": round_number,
            "warmup": warming,
            "reward": float(scores.mean()),
            "reward_std": float(scores.std()),
            "kl": float(divergence["kl"].mean()),
            "kl_signed": float(divergence["signed"].mean()),
            "kl_error": float(divergence["signed"].std() / np.sqrt(batch_size)),
            "kl_coefficient": float(coefficient),
            "token_entropy": float(-sampled.logprobs.sum() / max(1, sampled.mask.sum())),
            "value_explained": _explained(values, batch["returns"], sampled.mask),
            "response_length": float(sampled.lengths.mean()),
            "truncated": float(1 - sampled.finished.mean()),
            **_by_domain(rows, scores),
            **_task_accuracy(rows, texts),
            **means,
        }
        if samples_per_prompt > 1:
            metrics["zero_variance_groups"] = float((np.ptp(groups, axis=1) < ALIKE).mean())
        if not warming:  # before any update of the iteration: 1 and 0 when the two agree
            metrics["ratio_at_start"] = float(measured[0]["ratio"])
            metrics["mismatch"] = float(measured[0]["log_ratio"])
        if iteration % samples_every == 0 or iteration == iterations - 1:
            metrics["samples"] = [
                {
                    "round": round_number,
                    "domain": domain,
                    "prompt": messages[-1]["content"],
                    "response": text,
                    "score": float(scores[i]),
                    "kl": float(divergence["signed"][i]),
                    "length": int(sampled.lengths[i]),
                    "finished": bool(sampled.finished[i]),
                }
                for i, (domain, messages, text) in enumerate(judged)
            ][:samples_kept]
        history.add(iteration + 1, metrics, label)
        guards.check(history.rows, label)
        return state, metrics

    fit(
        folder,
        updates.init(actor_params, critic),
        iterate,
        steps=iterations,
        label=label,
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


class _History:
    """The newest metrics rows and all samples, those of the process before this one included.

    The files are read at the first iteration: by then `fit` has cut them to the checkpoint.
    """

    def __init__(self, folder: Path, length: int):
        self._folder, self._samples = folder, list[dict[str, Any]]()
        self.rows: collections.deque[dict[str, Any]] = collections.deque(maxlen=max(1, length))
        self._read = False

    def add(self, step: int, metrics: Mapping[str, Any], label: str) -> None:
        if not self._read:
            self._read = True
            self.rows.extend(self._earlier("metrics.jsonl"))
            self._samples += self._earlier("samples.jsonl")
        self.rows.append({"step": step, **metrics})
        if new := metrics.get("samples"):
            self._samples += [{"step": step, **row} for row in new]
            from internlm2_jax.report import samples  # here: it imports matplotlib

            samples.write(self._folder, self._samples, label)

    def _earlier(self, name: str) -> list[dict[str, Any]]:
        path = self._folder / name
        return files.read_jsonl(path) if path.is_file() else []


def _check_rows(layouts: Layouts, batch_size: int, minibatches: int) -> None:
    if batch_size % minibatches:
        raise UserError(f"PPO: {minibatches} minibatches do not divide a batch of {batch_size}")
    for role in ("actor", "critic", "reference", "reward"):
        ways = sharding.Layout.parse(getattr(layouts, role)).batch_ways
        rows = batch_size // (minibatches if role in ("actor", "critic") else 1)
        if rows % ways:
            raise UserError(
                f"PPO: {rows} rows do not divide over {ways} parts of the {role}'s layout "
                f"{getattr(layouts, role)!r}; change batch_size, minibatches or the layout"
            )


def _divergence(sampled: rollout.Rollout, reference: np.ndarray) -> dict[str, np.ndarray]:
    """KL of each response to the reference: "kl" by k3, "signed" by k1; nats, [B]."""
    pair = jnp.asarray(sampled.logprobs), jnp.asarray(reference)
    k3, signed = np.asarray(kl.k3(*pair)), np.asarray(kl.k1(*pair))
    return {
        name: np.where(sampled.mask, values, 0.0).sum(axis=1)
        for name, values in (("kl", k3), ("signed", signed))
    }


def _explained(values: np.ndarray, returns: np.ndarray, mask: np.ndarray) -> float:
    """Share of the returns' variance that the critic foresees: 1 at best, 0 for their mean."""
    spread = float(returns[mask].var()) if mask.any() else 0.0
    return 1 - float((returns - values)[mask].var()) / spread if spread > 0 else 0.0


def _by_domain(rows: Sequence[Mapping], scores: np.ndarray) -> dict[str, float]:
    domains = np.array([row["domain"] for row in rows])
    return {f"reward/{name}": float(scores[domains == name].mean()) for name in sorted({*domains})}


def _task_accuracy(rows: Sequence[Mapping], texts: Sequence[str]) -> dict[str, float]:
    """Share of the verifiable prompts answered rightly; nothing when there are none."""
    checked = [
        check(Task(**r["task"]), t) for r, t in zip(rows, texts, strict=True) if r.get("task")
    ]
    return {"task_accuracy": float(np.mean(checked))} if checked else {}


def _mean(rows: Sequence[Mapping], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
