"""PPO ends with a reason when its numbers cannot be right, and not before."""

from __future__ import annotations

import pytest

from internlm2_jax.rlhf.guards import Diverged, Guards

GOOD = {"kl_signed": 0.1, "kl_error": 0.2, "mismatch": 1e-4, "reward_std": 0.5}


def rows(*changes):
    return [{"step": n, **GOOD, **change} for n, change in enumerate(changes, start=1)]


BAD = {
    "have a negative KL .*-1, -1, -1 nats": {"kl_signed": -1.0},
    "sampler and trainer disagree by 0.3, 0.3, 0.3": {"mismatch": 0.3},
    "scores of a batch no longer differ": {"reward_std": 1e-5},
}


@pytest.mark.parametrize("reason", BAD)
def test_three_bad_iterations_end_it(reason):
    bad, guards = BAD[reason], Guards()
    guards.check(rows({}, bad, bad), "PPO")
    guards.check(rows(bad, bad, {}, bad), "PPO")
    guards.check(rows(bad, bad), "PPO")
    with pytest.raises(Diverged, match=f"PPO round 1: iterations 2 to 4.*{reason}"):
        Guards().check(rows({}, bad, bad, bad), "PPO round 1")
    Guards(negative_kl=0, mismatch=0, min_reward_std=0).check(rows(bad, bad, bad), "PPO")


def test_a_negative_mean_within_its_noise_is_none():
    Guards().check(rows(*[{"kl_signed": -0.5, "kl_error": 0.2}] * 5), "PPO")


def test_iterations_of_the_warm_up_have_no_mismatch():
    found = rows({}, {}, {})
    for row in found:
        del row["mismatch"]
    Guards().check(found, "PPO")
