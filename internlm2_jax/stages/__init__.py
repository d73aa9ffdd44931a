"""The stages of a run: plain callables `stage(folder, **keywords)`, each resumable on its own."""

from internlm2_jax.stages.contamination import contamination
from internlm2_jax.stages.cool_rlhf import cool_rlhf
from internlm2_jax.stages.cool_round import Mining
from internlm2_jax.stages.corpus import corpus
from internlm2_jax.stages.evaluate import evaluate
from internlm2_jax.stages.grpo import grpo
from internlm2_jax.stages.haystacks import haystacks
from internlm2_jax.stages.instructions import instructions
from internlm2_jax.stages.judge_policy import judge_policy
from internlm2_jax.stages.measure import measure
from internlm2_jax.stages.needle import Series, needle
from internlm2_jax.stages.phases import Phase
from internlm2_jax.stages.pipeline import Output, Pipeline
from internlm2_jax.stages.ppo import ppo
from internlm2_jax.stages.preferences import preferences
from internlm2_jax.stages.pretrain import pretrain
from internlm2_jax.stages.problems import problems
from internlm2_jax.stages.report import report
from internlm2_jax.stages.reward_model import RewardTraining, reward_model
from internlm2_jax.stages.reward_patch import reward_patch
from internlm2_jax.stages.sft import Conversations, sft
from internlm2_jax.stages.tokenizer import tokenizer

__all__ = [
    "Conversations",
    "Mining",
    "Output",
    "Phase",
    "Pipeline",
    "RewardTraining",
    "Series",
    "contamination",
    "cool_rlhf",
    "corpus",
    "evaluate",
    "grpo",
    "haystacks",
    "instructions",
    "judge_policy",
    "measure",
    "needle",
    "ppo",
    "preferences",
    "pretrain",
    "problems",
    "report",
    "reward_model",
    "reward_patch",
    "sft",
    "tokenizer",
]
