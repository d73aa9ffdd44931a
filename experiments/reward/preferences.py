"""Conditional reward models against unconditional ones, on public preference pairs.

Two fifths of the prompts are held out. The model is pre-trained on the machine's own texts and
fine-tuned on the chosen answers of the training pairs, as the report starts from an SFT model; it
ranks generated pairs of the same domains (data/preferences.py) beside the public ones. Both help it
to find out in few steps that the system prompt decides (docs/alignment.md).

Needs   : hh_rlhf, llmbar and pandalm in a folder: --set data=DIR (docs/alignment.md says what of
          them)
Mesh    : one CPU device
Expect  : 94 to 97% of the judgements on held-out conflicts right with the prompts, 50% without
          (docs/alignment.md); two minutes a run on two busy cores, after nine for what they share
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
    steps: int = 120,
    learning_rate: float = 2e-3,
    embed_dim: int = 64,
) -> Config:
    """`seed` is of the reward model alone, so that runs share the split and the trunk."""
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
                    steps=300,
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
            generated=3000,
        ),
        sft=Partial(
            stages.sft,
            tokenizer=Config(Output, "tokenizer"),
            instructions=Config(Output, "preferences"),
            base=Config(Output, "pretrain"),
            steps=300,
            batch_size=8,
            row_length=256,
            learning_rate=2e-3,
            validation_batches=2,
        ),
        reward_model=Partial(
            stages.reward_model,
            tokenizer=Config(Output, "tokenizer"),
            instructions=Config(Output, "preferences"),
            base=Config(Output, "sft"),
            domains=prompts[condition],
            shares={"conflict": 0.45, "generated": 0.4},
            seed=seed,
            training=Config(
                RewardTraining,
                learning_rate=learning_rate,
                steps=steps,
                row_length=384,
                tokens_per_batch=8 * 384,
                too_long="cut",
                warmup=20,
                final_ratio=0.1,
                weight_decay=0.05,
                validate_every=0,
                loss=Config(RewardLoss, ranking=ranking),
            ),
        ),
        report=Partial(stages.report, after=Config(Output, "reward_model")),
    )


def tiny(seed: int = 0, corpus: str | None = None, data: str = "../shared/data") -> Config:
    """The same in a few steps."""
    config = experiment(seed=seed, corpus=corpus, data=data, steps=4, embed_dim=32)
    config.corpus.max_bytes, config.corpus.validation_fraction = 500_000, 0.1
    config.tokenizer.vocab_size = 512
    config.pretrain.validation_tokens = 1024
    config.pretrain.phases[0].steps, config.pretrain.phases[0].warmup = 4, 1
    config.sft.steps, config.sft.validation_batches = 4, 1
    return config
