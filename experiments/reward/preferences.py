"""Conditional reward models against unconditional ones, on public preference pairs.

Needs   : hh_rlhf, llmbar and pandalm in a folder: --set data=DIR (docs/alignment.md says what of
          them); the model is pre-trained on the machine's own texts first
Mesh    : one CPU device
Expect  : chance on public pairs at this size (docs/alignment.md); a larger model has not been tried
Run     : internlm2 run experiments/reward/preferences.py --set data=../shared/data
          internlm2 run experiments/reward/preferences.py --set data=../shared/data \\
              --sweep condition=domains,none --sweep ranking=focal,bradley_terry --seeds 3
"""

from __future__ import annotations

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.data.preferences import DOMAINS, unconditional
from internlm2_jax.errors import UserError
from internlm2_jax.losses.preference import RewardLoss
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Output, Phase, Pipeline, RewardTraining

USED = ("harmless", "helpful", "instruction_following")


def experiment(
    seed: int = 0,
    corpus: str | None = None,
    data: str = "../shared/data",
    condition: str = "domains",
    ranking: str = "focal",
    steps: int = 300,
    learning_rate: float = 1e-3,
    preset_name: str = "demo",
) -> Config:
    """`seed` is of the reward model alone, so that runs share the corpus and the trunk."""
    prompts = {"domains": {d: DOMAINS[d] for d in USED}, "none": unconditional(USED)}
    if condition not in prompts:
        raise UserError(f"condition is {condition!r}; it is one of {', '.join(prompts)}")
    return Config(
        Pipeline,
        corpus=Partial(
            stages.corpus, files_below=corpus, max_bytes=6_000_000, validation_fraction=0.02
        ),
        tokenizer=Partial(stages.tokenizer, corpus=Config(Output, "corpus"), vocab_size=2048),
        pretrain=Partial(
            stages.pretrain,
            tokenizer=Config(Output, "tokenizer"),
            model=Config(preset, preset_name),
            phases=[
                Config(
                    Phase,
                    name="short",
                    steps=400,
                    sequence_length=256,
                    batch_size=8,
                    rope_theta=10_000.0,
                    learning_rate=3e-3,
                    warmup=40,
                    final_ratio=0.1,
                    mixture={"code": 0.3, "text": 0.7},
                )
            ],
            validation_tokens=8192,
        ),
        preferences=Partial(
            stages.preferences,
            sets={
                "hh_rlhf": f"{data}/hh_rlhf/harmless_base.jsonl",
                "llmbar": f"{data}/llmbar",
                "pandalm": f"{data}/pandalm/testset-v1.json",
            },
            turns=1,
            validation_share=0.4,
        ),
        reward_model=Partial(
            stages.reward_model,
            tokenizer=Config(Output, "tokenizer"),
            instructions=Config(Output, "preferences"),
            base=Config(Output, "pretrain"),
            domains=prompts[condition],
            shares={"conflict": 0.6},
            seed=seed,
            training=Config(
                RewardTraining,
                learning_rate=learning_rate,
                steps=steps,
                row_length=256,
                tokens_per_batch=2048,
                too_long="cut",
                warmup=20,
                final_ratio=0.1,
                weight_decay=0.1,
                validate_every=150,
                loss=Config(RewardLoss, ranking=ranking),
            ),
        ),
        report=Partial(stages.report, after=Config(Output, "reward_model")),
    )


def tiny(seed: int = 0, corpus: str | None = None, data: str = "../shared/data") -> Config:
    """The same in a few steps."""
    config = experiment(seed=seed, corpus=corpus, data=data, steps=4, preset_name="tiny")
    config.corpus.max_bytes, config.corpus.validation_fraction = 500_000, 0.1
    config.tokenizer.vocab_size = 512
    config.pretrain.validation_tokens = 1024
    config.pretrain.phases[0].steps, config.pretrain.phases[0].warmup = 4, 1
    return config
