import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from internlm2_jax.losses.language_model import cross_entropy, token_logprobs


def example(batch=2, time=5, vocab=11, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, time, vocab)) * 3
    targets = rng.integers(0, vocab, (batch, time))
    mask = rng.random((batch, time)) < 0.6
    return logits, targets, mask


def oracle(logits, targets, mask, z_loss=0.0):
    total = 0.0
    for b, t in np.argwhere(mask):
        row = logits[b, t]
        normaliser = np.log(sum(np.exp(x) for x in row))
        total += normaliser - row[targets[b, t]] + z_loss * normaliser**2
    return total


def test_matches_a_float64_loop():
    logits, targets, mask = example()
    for z_loss in (0.0, 1e-2):
        total, weight = cross_entropy(
            jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask), z_loss
        )
        np.testing.assert_allclose(total, oracle(logits, targets, mask, z_loss), rtol=1e-5)
        assert weight == mask.sum()


def test_gradient_is_softmax_minus_one_hot_on_masked_tokens_only():
    logits, targets, mask = example()
    grad = jax.grad(lambda x: cross_entropy(x, jnp.asarray(targets), jnp.asarray(mask))[0])(
        jnp.asarray(logits, jnp.float32)
    )
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (softmax - np.eye(logits.shape[-1])[targets]) * mask[..., None]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_float_weights_scale_tokens():
    logits, targets, mask = example()
    weights = np.where(mask, 0.25, 0.0)
    total, weight = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    np.testing.assert_allclose(total, 0.25 * oracle(logits, targets, mask), rtol=1e-5)
    np.testing.assert_allclose(weight, 0.25 * mask.sum())


def test_rows_add_up_to_the_batch():
    logits, targets, mask = map(jnp.asarray, example(batch=4))
    parts = [
        cross_entropy(logits[i : i + 1], targets[i : i + 1], mask[i : i + 1]) for i in range(4)
    ]
    whole = cross_entropy(logits, targets, mask)
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 1, 4096), jnp.bfloat16)
    logprobs = token_logprobs(logits, jnp.zeros((1, 1), jnp.int32))
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, -np.log(4096), rtol=1e-6)


def test_huge_logits_and_masked_infinities_stay_finite():
    logits = jnp.array([[[1e4, -1e4], [jnp.inf, jnp.inf]]])
    total, weight = cross_entropy(logits, jnp.zeros((1, 2), jnp.int32), jnp.array([[True, False]]))
    assert total == 0.0 and weight == 1.0


def test_probabilities_sum_to_one():
    logits, _, _ = example()
    total = sum(
        jnp.exp(token_logprobs(jnp.asarray(logits), jnp.full((2, 5), v))) for v in range(11)
    )
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_vocabulary_split_over_a_mesh_needs_no_gather():
    logits, targets, mask = example(batch=2, time=4, vocab=16)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: B023, E731
            arguments = (
                put(np.float32(logits), "data", None, "model"),
                put(targets, "data"),
                put(mask, "data"),
            )
            step = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(*a)[0])).lower(*arguments)
            step = step.compile()
            loss, grad = step(*arguments)
            text = step.as_text()
        np.testing.assert_allclose(loss, oracle(logits, targets, mask), rtol=1e-5)
        assert grad.sharding.spec == P("data", None, "model")
        assert "all-gather" not in text and "all-reduce" in text
