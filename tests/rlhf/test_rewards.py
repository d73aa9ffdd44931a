import jax.numpy as jnp
import numpy as np

from internlm2_jax.rlhf import rewards
from internlm2_jax.rlhf.kl import k3

MASK = jnp.array([[True, True, True, False], [False, True, False, False], [False] * 4])
LOGPROBS = jnp.array([[-1.0, -2.0, -3.0, -9.0], [-9.0, -1.0, -9.0, -9.0], [-1.0] * 4])
REFERENCE = jnp.array([[-1.5, -1.0, -3.0, 0.0], [0.0, -1.2, 0.0, 0.0], [-5.0] * 4])
SCORES = jnp.array([0.7, -1.6, 3.0])


def test_score_sits_on_the_last_token_and_every_token_pays_kl():
    shaped = rewards.shape(
        SCORES, LOGPROBS, REFERENCE, MASK, jnp.array([True] * 3), kl_coefficient=0.1
    )
    expected = [[-0.05, 0.1, 0.7, 0.0], [0.0, -1.6 - 0.02, 0.0, 0.0], [0.0] * 4]
    np.testing.assert_allclose(shaped, expected, atol=1e-6)


def test_fractional_scores_are_not_truncated_whatever_dtype_comes_in():
    """A peer builds the array from integer token ids, where 0.7 becomes 0 and -1.6 becomes -1."""
    shaped = rewards.shape(
        SCORES.astype(jnp.bfloat16),
        LOGPROBS,
        LOGPROBS,
        MASK.astype(jnp.int32),
        jnp.array([1, 1, 1]),
    )
    assert shaped.dtype == jnp.float32
    np.testing.assert_allclose(shaped.sum(axis=1), [0.7, -1.6, 0.0], rtol=1e-2)
    whole = rewards.shape(jnp.array([2, -1, 0]), LOGPROBS, LOGPROBS, MASK, jnp.ones(3, bool))
    assert whole.dtype == jnp.float32 and whole.sum() == 1.0


def test_unfinished_rows_lose_the_penalty_and_only_those():
    shaped = rewards.shape(
        SCORES, LOGPROBS, LOGPROBS, MASK, jnp.array([False, True, False]), missing_eos_penalty=1.0
    )
    np.testing.assert_allclose(shaped.sum(axis=1), [-0.3, -1.6, 0.0], rtol=1e-5)


def test_another_estimator_can_be_given():
    shaped = rewards.shape(
        jnp.zeros(3),
        LOGPROBS,
        REFERENCE,
        MASK,
        jnp.ones(3, bool),
        kl_coefficient=1.0,
        estimator=k3,
    )
    np.testing.assert_allclose(shaped, -np.where(MASK, k3(LOGPROBS, REFERENCE), 0.0), rtol=1e-6)


def test_infinities_off_the_mask_do_not_leak():
    dirty = jnp.where(MASK, LOGPROBS, -jnp.inf)
    shaped = rewards.shape(SCORES, dirty, REFERENCE, MASK, jnp.ones(3, bool))
    assert np.isfinite(shaped).all()


def test_last_token_of_masks_with_gaps():
    mask = jnp.array([[True, False, True, False], [True] * 4, [False] * 4])
    np.testing.assert_array_equal(
        rewards.last_token(mask),
        [[False, False, True, False], [False, False, False, True], [False] * 4],
    )


def test_running_moments_are_those_of_all_scores_so_far():
    rng = np.random.default_rng(0)
    batches = [rng.normal(5.0, 3.0, size).astype(np.float32) for size in (4, 1, 7, 16)]
    moments = rewards.Moments.empty()
    for batch in batches:
        moments = moments.after(jnp.asarray(batch))
    seen = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(moments.mean, seen.mean(), rtol=1e-5)
    np.testing.assert_allclose(moments.std, seen.std(), rtol=1e-5)
    scores = rewards.normalised(jnp.asarray([5.0, 8.0]), moments)
    np.testing.assert_allclose(
        scores, (np.array([5.0, 8.0]) - seen.mean()) / seen.std(), rtol=1e-4, atol=1e-5
    )
    assert np.isfinite(
        rewards.normalised(jnp.ones(2), rewards.Moments.empty().after(jnp.ones(2)))
    ).all()
