"""What COOL RLHF adds: SFT alone, a plain reward model with PPO, conditional with online rounds.

    sft     the fine-tuned model
    plain   one unconditional Bradley-Terry reward model, one long round of PPO
    cool    the conditional reward model (focal loss, barrier), PPO in rounds, patches and labels

All arms share the corpus, the model before alignment and the number of PPO iterations; `cool`
labels its comparisons by a program that knows the truth, as people would. The policy must move far
enough in a hundred iterations to show what a reward model asks of it: learning rates are high, and
the KL coefficient with them. Higher still (1e-3), and chance decides how a run ends.

Needs   : nothing; the corpus is what every machine has (sources and documentation), or --corpus DIR
Mesh    : one CPU device
Expect  : good answers, means over 5 seeds with 95% intervals: sft 20% [17, 22], plain 28%
          [21, 35], cool 36% [34, 39], in risky requests declined (docs/alignment.md)
Run     : internlm2 run experiments/ablations/cool_rlhf.py --sweep arm=sft,plain,cool --seeds 3
"""

from __future__ import annotations

import functools

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.data.preferences import unconditional
from internlm2_jax.errors import UserError
from internlm2_jax.losses.preference import RewardLoss
from internlm2_jax.models.config import preset
from internlm2_jax.rlhf.ppo import PPOConfig
from internlm2_jax.stages import Mining, Output, Phase, Pipeline, RewardTraining

ARMS = ("sft", "plain", "cool")
output = functools.partial(Config, Output)


def experiment(
    arm: str = "cool",
    seed: int = 0,
    corpus: str | None = None,
    rounds: int = 2,
    iterations: int = 100,
    embed_dim: int = 64,
) -> Config:
    """`seed` is of everything after SFT, so that all runs share the model that they align;
    `iterations` of PPO are of all rounds together."""
    if arm not in ARMS:
        raise UserError(f"arm is {arm!r}; it is one of {', '.join(ARMS)}")
    common = {"tokenizer": output("tokenizer"), "instructions": output("instructions")}
    training = functools.partial(
        Config, RewardTraining, row_length=256, tokens_per_batch=16 * 256, validate_every=0
    )
    rollouts = functools.partial(
        Partial,
        stages.ppo,
        batch_size=32,
        prompt_length=64,
        max_new_tokens=32,
        reward_row_length=128,
        pretrain_mixture={"code": 0.5, "text": 0.5},
        warmup_iterations=3,
        config=Config(
            PPOConfig,
            actor_learning_rate=3e-4,
            critic_learning_rate=1e-3,
            kl_coefficient=0.1,
            pretrain_coefficient=0.02,
            epochs=2,
            minibatches=2,
        ),
    )
    before = {
        "corpus": Partial(stages.corpus, files_below=corpus, max_bytes=8_000_000),
        "tokenizer": Partial(stages.tokenizer, corpus=output("corpus"), vocab_size=2048),
        "instructions": Partial(stages.instructions, corpus=output("corpus"), sft=8000),
        "pretrain": Partial(
            stages.pretrain,
            **common,
            model=Config(
                preset,
                "tiny",
                num_layers=3,
                embed_dim=embed_dim,
                head_dim=embed_dim // 4,
                mlp_dim=11 * embed_dim // 4,
            ),
            phases=[
                Config(
                    Phase,
                    name="short",
                    steps=400,
                    sequence_length=128,
                    batch_size=8,
                    rope_theta=10_000.0,
                    learning_rate=3e-3,
                    warmup=40,
                    final_ratio=0.2,
                    mixture={"code": 0.5, "text": 0.5},
                )
            ],
            validation_tokens=8192,
        ),
        "sft": Partial(
            stages.sft,
            **common,
            base=output("pretrain"),
            steps=500,
            batch_size=8,
            row_length=128,
            learning_rate=2e-3,
        ),
    }
    first = training(steps=100, learning_rate=5e-4, warmup=10)
    if arm == "plain":
        align = {
            "reward_model": Partial(
                stages.reward_model,
                **common,
                base=output("sft"),
                domains=unconditional(),
                training=training(
                    steps=100,
                    learning_rate=5e-4,
                    warmup=10,
                    loss=Config(RewardLoss, ranking="bradley_terry", penalty="none"),
                ),
                seed=seed,
            ),
            "ppo": rollouts(
                **common,
                actor=output("sft"),
                reference=output("sft"),
                reward=output("reward_model"),
                iterations=iterations,
                seed=seed + 1000,
            ),
        }
    elif arm == "cool":
        align = {
            "cool_rlhf": Partial(
                stages.cool_rlhf,
                **common,
                sft=output("sft"),
                reward_model=Partial(stages.reward_model, training=first),
                ppo=rollouts(iterations=iterations // rounds),
                later_training=training(steps=40, learning_rate=2e-4),
                mining=Config(Mining, num_prompts=384, comparisons=150, max_new_tokens=32),
                rounds=rounds,
                judge="rule",
                seed=seed,
            )
        }
    else:
        align = {}
    policy = {"sft": "sft", "plain": "ppo", "cool": "cool_rlhf"}[arm]
    return Config(
        Pipeline,
        **before,
        **align,
        judge_policy=Partial(
            stages.judge_policy,
            **common,
            policy=output(policy),
            sft=output("sft"),
            arm=arm,
            seed=seed,
        ),
    )


def tiny(arm: str = "cool", seed: int = 0, corpus: str | None = None) -> Config:
    """The same in a few steps."""
    config = experiment(arm=arm, seed=seed, corpus=corpus, iterations=4, embed_dim=32)
    config.corpus.max_bytes, config.corpus.validation_fraction = 1_000_000, 0.1
    config.tokenizer.vocab_size = 1024
    sizes = config.instructions
    sizes.sft, sizes.preference_pairs, sizes.prompts, sizes.eval_tasks = 400, 200, 100, 20
    config.pretrain.phases[0].steps, config.pretrain.phases[0].warmup = 4, 1
    config.sft.steps = 4
    return config
