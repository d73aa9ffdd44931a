"""GRPO and PPO of a small model on a CPU, beside TRL (torch) and tunix (JAX).

    python -m venv TRL && TRL/bin/pip install torch trl           PPO is in trl<0.24 alone
    python -m venv TUNIX && TUNIX/bin/pip install google-tunix
    python benchmarks/rlhf.py grpo --trl TRL/bin/python --tunix TUNIX/bin/python [--threads 2]
    python benchmarks/rlhf.py ppo --trl TRL/bin/python --tunix TUNIX/bin/python

One step: 64 responses of 32 tokens to prompts of 32 (GRPO: 8 prompts, 8 responses each), a reward
that is the share of even tokens, one update of AdamW with the gradient norm clipped to 1. Llama of
4 layers of 128, 4 query and 2 key/value heads of 32, an MLP of 352, 2,048 pieces, float32. GRPO:
the token-level loss, no KL. PPO: a critic of the same size, the KL to a reference in the reward,
one epoch. Each lives in a process of its own; they take turns, one step each; medians are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import click
from turns import ask, serve

PROMPTS, GROUP, PROMPT, NEW = 8, 8, 32, 32
SIZES = {
    "vocab_size": 2048, "num_layers": 4, "embed_dim": 128, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 32, "mlp_dim": 352,
}  # fmt: skip
HERE = Path(__file__).parent


def worker(algorithm: str) -> None:
    """Ours: the parts that the stages are made of."""
    import jax
    import numpy as np

    from internlm2_jax.infer.sampling import Sampling
    from internlm2_jax.models.build import build
    from internlm2_jax.models.config import preset
    from internlm2_jax.rlhf import grpo, ppo, rollout
    from internlm2_jax.rlhf.verifiers import Verdict

    model = build(preset("demo", **SIZES))
    critic = build(preset("demo", **SIZES), head="scalar")
    params, values = model.init(jax.random.key(0)), critic.init(jax.random.key(1))
    rng = np.random.default_rng(0)
    seconds: dict[str, float] = {}

    def sample(params, number, repeats):
        prompts = rng.integers(3, 2000, (PROMPTS * GROUP // repeats, PROMPT)).tolist()
        start = time.perf_counter()
        found = rollout.sample(
            model, params, [p for p in prompts for _ in range(repeats)], prompt_length=PROMPT,
            max_new_tokens=NEW, sampling=Sampling(temperature=1.0), seed=number, stop_ids=(2047,),
            pad_id=2046,
        )  # fmt: skip
        seconds["rollout"] = time.perf_counter() - start
        start = time.perf_counter()
        scores = [sum(t % 2 == 0 for t in r) / len(r) for r in found.responses]
        seconds["scoring"] = time.perf_counter() - start
        return found, np.asarray(scores, np.float32)

    if algorithm == "grpo":
        config = grpo.GRPOConfig(dynamic_rounds=1)
        updates = grpo.GroupUpdates(model, config, NEW)
        state = updates.init(params)

        def step(number):
            nonlocal state
            sampled, scores = sample(state["params"], number, GROUP)
            start = time.perf_counter()
            verdicts = [Verdict("pass", score=float(s)) for s in scores]
            texts = [""] * len(verdicts)
            found = grpo.grouped([{}] * PROMPTS, sampled, texts, verdicts, config, NEW)
            state, metrics = updates.update(state, grpo.to_batch(found, config))
            jax.block_until_ready((state, metrics))
            seconds["update"] = time.perf_counter() - start

    else:
        config = ppo.PPOConfig(kl_coefficient=0.04, pretrain_coefficient=0.0)
        both = ppo.Updates(model, critic, config)
        state = both.init(params, values)
        # The loss that the report mixes in cannot be left out: one row of it is next to nothing.
        row = np.ones((1, 2), np.int32)
        extra = {
            "tokens": row, "targets": row, "segment_ids": row, "positions": row - 1,
            "loss_mask": np.ones((1, 2), np.float32),
        }  # fmt: skip

        def step(number):
            nonlocal state
            sampled, scores = sample(state["params"], number, 1)
            start = time.perf_counter()
            reference, old = both.assess(params, state["critic"], sampled.tokens)
            advantages, returns = both.estimate(
                scores, sampled.logprobs, reference, old, sampled.mask, sampled.finished
            )
            batch = {
                "tokens": sampled.tokens, "mask": sampled.mask, "logprobs": sampled.logprobs,
                "advantages": advantages, "returns": returns,
            }  # fmt: skip
            state, _ = both.update_critic(state, batch)
            state, metrics = both.update_actor(state, batch, extra)
            jax.block_until_ready((state, metrics))
            seconds["update"] = time.perf_counter() - start

    print(f"ours: jax {jax.__version__}", flush=True)
    for number, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        step(number)
        print(json.dumps({"step": time.perf_counter() - start, **seconds}), flush=True)


@click.command()
@click.argument("algorithm", type=click.Choice(["grpo", "ppo"]))
@click.option("--trl", help="Python of an environment with torch and trl.")
@click.option("--tunix", help="Python of an environment with google-tunix.")
@click.option("--threads", default=2)
@click.option("--steps", default=15, help="After 3 that compile.")
@click.option("--as-worker", is_flag=True, hidden=True)
def main(algorithm, trl, tunix, threads, steps, as_worker) -> None:
    if as_worker:
        worker(algorithm)
        return
    commands = {"ours": [sys.executable, __file__, algorithm, "--as-worker"]}
    if trl:
        commands["TRL"] = [trl, str(HERE / f"rlhf_trl_{algorithm}.py"), str(threads)]
    if tunix:
        commands["tunix"] = [tunix, str(HERE / "rlhf_tunix.py"), algorithm]
    os.environ["HF_HUB_OFFLINE"] = "1"
    workers = {name: serve(command, threads) for name, command in commands.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(steps + 3):
        rows = {name: json.loads(ask(process, "step")) for name, process in workers.items()}
        if number >= 3:
            for name, row in rows.items():
                found[name].append(row)
        took = ", ".join(f"{name} {row['step']:.2f} s" for name, row in rows.items())
        click.echo(f"{number + 1}/{steps + 3}: {took}", err=True)
    for process in workers.values():
        process.kill()
    middle = {n: statistics.median(r["step"] for r in rows) for n, rows in found.items()}
    for name, rows in found.items():
        click.echo(
            f"{name:6} {1 / middle[name]:6.2f} steps/s   ours is "
            f"{middle[name] / middle['ours']:.2f} times as fast   "
            f"(from {min(r['step'] for r in rows):.3f} to {max(r['step'] for r in rows):.3f} s)"
        )
        parts = {p: sum(r.get(p, 0.0) for r in rows) for p in ("rollout", "scoring", "update")}
        total = sum(r["step"] for r in rows)
        if parts["rollout"]:
            click.echo(" " * 7 + ", ".join(f"{p} {v / total:.0%}" for p, v in parts.items()))


if __name__ == "__main__":
    main()
