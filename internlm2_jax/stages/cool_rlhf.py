"""COOL RLHF: rounds of reward model, PPO and the search for reward hacking (InternLM2 section 4.2).

    round r:  reward_model_roundR   first pairs, patches and labels of the rounds before
              ppo_roundR            PPO against it, from the policy of the round before
              patches_roundR        how the policy games it: patch pairs, comparisons for people

One program, three rounds in the report. It is a pipeline in the stage's own folder, so each part is
skipped when done and goes on where it was cut; report.html there shows all rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.annotation import JUDGES
from internlm2_jax.stages.cool_round import Mining, mine_round, next_reward_model
from internlm2_jax.stages.pipeline import Output, Pipeline
from internlm2_jax.stages.reward_model import RewardTraining
from internlm2_jax.train.checkpoint import load_model, save_model_json


def cool_rlhf(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    sft: Path,
    reward_model: functools.partial,
    ppo: functools.partial,
    later_training: RewardTraining,
    mining: Mining,
    rounds: int = 3,
    judge: str = "",
    label_lag: int = 0,
    patch_share: float = 0.3,
    label_share: float = 0.2,
    seed: int = 0,
) -> None:
    """Runs the rounds, and ends as the policy of the last one.

    Args:
        reward_model: Partial(stages.reward_model, ...): the first round's, without its inputs.
        ppo: Partial(stages.ppo, ...): every round's, without its inputs.
        later_training: of the reward model from the second round on.
        judge: a program of annotation.JUDGES, "rule", that labels in people's place. Without one,
            `internlm2 annotate` lets a person do it, and a round takes the labels that are there
            when it starts.
        label_lag: labels of a round count that many rounds later than the next.
        patch_share, label_share: of a later reward model's batches.
    """
    if rounds < 1 or label_lag < 0:
        raise UserError(f"cool_rlhf: {rounds} rounds and a label lag of {label_lag}; give 1 and 0")
    if judge and judge not in JUDGES:
        raise UserError(f"cool_rlhf: no judge {judge!r}; there are {', '.join(JUDGES)}")
    output: Callable[[str], Any] = Output  # stands for a path
    shared = {"tokenizer": tokenizer, "instructions": instructions}
    stages: dict[str, functools.partial] = {}
    for r in range(1, rounds + 1):
        before = [f"patches_round{i}" for i in range(1, r)]
        judged = f"reward_model_round{r}"
        policy = sft if r == 1 else output(f"ppo_round{r - 1}")
        if r == 1:
            stages[judged] = _with(reward_model, **shared, base=sft, seed=seed)
        else:
            stages[judged] = functools.partial(
                _later_reward_model,
                **shared,
                reward=output(f"reward_model_round{r - 1}"),
                rounds={name: output(name) for name in before},
                labelled=before[: max(0, r - 1 - label_lag)],
                training=later_training,
                patch_share=patch_share,
                label_share=label_share,
                seed=seed + r,
            )
        stages[f"ppo_round{r}"] = _with(
            ppo,
            **shared,
            actor=policy,
            reference=sft,
            reward=output(judged),
            round_number=r,
            seed=seed + 1000 * r,
        )
        stages[f"patches_round{r}"] = functools.partial(
            mine_round,
            **shared,
            reward=output(judged),
            reference=sft,
            early=policy,
            late=output(f"ppo_round{r}"),
            mining_config=mining,
            reward_row_length=ppo.keywords["reward_row_length"],
            judge=judge,
            seed=seed + r,
        )
    Pipeline(**stages).run(folder)
    from internlm2_jax.report import page  # here: it imports matplotlib

    last = f"ppo_round{rounds}"
    model, _ = load_model(folder / last)
    save_model_json(folder, model.cfg, "lm", params=last)
    files.write_json(folder / "result.json", _summary(folder, rounds))
    page.build(folder, sections=page.ROUNDS)


def _later_reward_model(
    folder: Path, *, rounds: Mapping[str, Path], labelled: list[str], **settings: Any
) -> None:
    next_reward_model(
        folder,
        rounds=list(rounds.values()),
        labelled=[rounds[name] for name in labelled],
        **settings,
    )


def _with(stage: functools.partial, **inputs: Any) -> functools.partial:
    """The stage with its inputs. Errors: UserError when the caller has set one of them."""
    if twice := sorted(stage.keywords.keys() & inputs.keys()):
        raise UserError(
            f"cool_rlhf sets {', '.join(twice)} of {stage.func.__name__} itself; leave it out"
        )
    return functools.partial(stage.func, **stage.keywords, **inputs)


def _summary(folder: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": rounds}
    for r in range(1, rounds + 1):
        policy = files.read_json(folder / f"ppo_round{r}" / "result.json")
        mined = files.read_json(folder / f"patches_round{r}" / "result.json")
        found[f"round{r}"] = {
            "reward_last": policy["reward_last"],
            "kl_last": policy["kl_last"],
            "patches": mined["hacking"]["num_pairs"],
            "strongest_rise": mined["hacking"]["late_rate"] - mined["hacking"]["early_rate"],
            "length_growth": mined["length_growth"],
        }
    return found
