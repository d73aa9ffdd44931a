"""tunix's GRPO and PPO for benchmarks/rlhf.py: a step a line of standard input.

Its Qwen3, a Llama with a norm on queries and keys: its PPO cannot run its Llama (0.1.7).
"""

import json
import os
import sys
import time

out = os.fdopen(os.dup(1), "w", buffering=1)  # tunix prints to standard output
os.dup2(2, 1)

import importlib.metadata

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen
from tunix.rl import rl_cluster as clusters
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.utils import create_critic_model

ALGORITHM = sys.argv[1]
GROUP = 8 if ALGORITHM == "grpo" else 1
PROMPTS = 64 // GROUP


class Words:
    """The tokenizer: w17 is token 17."""

    def encode(self, text, **_):
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(f"w{int(i)}" for i in ids)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2047

    def pad_id(self):
        return 2046

    def dedup_bos_ids(self, ids):
        return ids


sizes = qwen.ModelConfig(
    num_layers=4, vocab_size=2048, embed_dim=128, hidden_dim=352, num_heads=4, head_dim=32,
    num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
)  # fmt: skip
spent = {"rollout": 0.0, "scoring": 0.0}


def reward(prompts, completions, **_):
    start = time.perf_counter()
    scores = []
    for text in completions:
        ids = [int(word[1:]) for word in text.split()]
        scores.append(sum(i % 2 == 0 for i in ids) / max(1, len(ids)))
    spent["scoring"] += time.perf_counter() - start
    return scores


def turns():
    """Batches of prompts; a batch is asked for when the step before it has ended."""
    rng = np.random.default_rng(0)
    while sys.stdin.readline():
        spent.update(rollout=0.0, scoring=0.0)
        start = time.perf_counter()
        rows = rng.integers(3, 2000, (PROMPTS, 32))
        yield {"prompts": np.array([" ".join(f"w{i}" for i in row) for row in rows])}
        jax.block_until_ready(nnx.state(actor))
        step = time.perf_counter() - start
        rest = step - spent["rollout"] - spent["scoring"]
        out.write(json.dumps({"step": step, **spent, "update": rest}) + "\n")
    os._exit(0)


mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
with mesh:
    actor = qwen.Qwen3(sizes, rngs=nnx.Rngs(0))
    reference = qwen.Qwen3(sizes, rngs=nnx.Rngs(0))


def adamw():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, b2=0.95, weight_decay=0.0))


roles = [clusters.Role.ACTOR, clusters.Role.REFERENCE, clusters.Role.ROLLOUT]
critic = {}
if ALGORITHM == "ppo":
    roles.append(clusters.Role.CRITIC)
    critic = {"critic": create_critic_model(actor)}
cluster = clusters.RLCluster(
    actor=actor,
    reference=reference,
    **critic,
    tokenizer=Words(),
    cluster_config=clusters.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        rollout_engine="vanilla",
        training_config=clusters.RLTrainingConfig(
            actor_optimizer=adamw(),
            critic_optimizer=adamw(),
            eval_every_n_steps=1_000_000,
            max_steps=100_000,
            mini_batch_size=PROMPTS,
            train_micro_batch_size=PROMPTS,
            checkpoint_root_directory=None,
            metrics_logging_options=None,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=32, max_prompt_length=32, kv_cache_size=128, temperature=1.0,
            top_p=1.0, eos_tokens=[2047],
        ),
    ),
)  # fmt: skip
generate = cluster.generate


def timed(*args, **options):
    start = time.perf_counter()
    found = generate(*args, **options)
    spent["rollout"] += time.perf_counter() - start
    return found


cluster.generate = timed
if ALGORITHM == "grpo":
    config = GRPOConfig(
        num_generations=GROUP, num_iterations=1, beta=0.0, epsilon=0.2, loss_agg_mode="token-mean"
    )
    learner = GRPOLearner(rl_cluster=cluster, reward_fns=reward, algo_config=config)
else:
    config = PPOConfig(num_iterations=1, beta=0.04, gae_lambda=0.99)
    learner = PPOLearner(rl_cluster=cluster, ppo_config=config, reward_fns=reward)
out.write(f"tunix: {importlib.metadata.version('google-tunix')}, jax {jax.__version__}\n")
with mesh:
    learner.train(turns())
