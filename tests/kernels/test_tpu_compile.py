"""The TPU compiler takes the kernels, for real chips, ahead of time, with no TPU at hand."""

from __future__ import annotations

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from internlm2_jax.kernels import attention, decode_gqa, flash_blocks, flash_gqa

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install -e '.[plan]'",
    ),
]


@pytest.fixture(scope="module", params=TOPOLOGIES)
def mesh(request):
    """One chip."""
    from jax.experimental import topologies

    # No TPU is asked what it is, and test processes beside this one load the library too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    description = topologies.get_topology_desc(TOPOLOGIES[request.param], platform="tpu")
    return jax.make_mesh((1,), ("data",), devices=description.devices[:1])


def compile_for(mesh, function, *shapes):
    """The program before XLA, which names the kernels, and the compiled one."""
    spec = jax.NamedSharding(mesh, jax.P())
    arguments = [
        None if shape is None else jax.ShapeDtypeStruct(*shape, sharding=spec) for shape in shapes
    ]
    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*arguments)
        return lowered.as_text(), lowered.compile()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [4096, 32768])
def test_flash(mesh, length, dim):
    """Forward and backward of packed rows, by the dispatch that models call."""

    def step(q, k, v, segment_ids, dout):
        function = functools.partial(attention.dispatch, segment_ids=segment_ids)
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    q, k = ((1, length, 4, dim), jnp.bfloat16), ((1, length, 1, dim), jnp.bfloat16)
    text, compiled = compile_for(mesh, step, q, k, k, ((1, length), jnp.int32), q)
    assert "flash_gqa_forward" in text
    assert "flash_gqa_backward" in text
    # Linear in the length: some arrays of the size of q in float32 and a padded head dimension.
    largest = 4 * length * 128 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * largest
    # The compiler counts what the kernels' cost estimates say.
    least = 7 * 2 * 4 * dim * length**2 / 2
    assert least < compiled.cost_analysis()["flops"] < 1.2 * least + 1e9


def test_flash_windows_and_offsets(mesh):
    """Shapes that divide nothing, float32, keys before the queries: as ring attention calls it."""
    settings = {"window": 700, "q_offset": 1000}

    def step(q, k, v, dout):
        out, lse = flash_gqa.attend(q, k, v, **settings)
        return out, lse, *flash_gqa.attend_backward(q, k, v, out, lse, dout, **settings)

    q, k = ((2, 1000, 6, 128), jnp.float32), ((2, 1500, 1, 128), jnp.float32)
    compile_for(mesh, step, q, k, k, q)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "page", "dim"), [("bfloat16", 64, 128), ("bfloat16", 16, 64), ("int8", 128, 128)]
)
def test_decode(mesh, dtype, page, dim, queries):
    rows, table = 8, 4096 // page
    pages = ((rows * table, 8, page, dim), jnp.dtype(dtype))
    scales = ((rows * table, 8, page), jnp.float32) if dtype == "int8" else None

    def step(q, k, v, page_table, lengths, k_scales, v_scales):
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        return decode_gqa.decode_gqa(q, k, v, page_table, lengths, window=3000, **scales)

    text, compiled = compile_for(
        mesh,
        step,
        ((rows, queries, 32, dim), jnp.bfloat16),
        pages,
        pages,
        ((rows, table), jnp.int32),
        ((rows,), jnp.int32),
        scales,
        scales,
    )
    assert "decode_gqa" in text
    if dim == flash_blocks.LANES:
        # The pages are read where they are, not copied first.
        assert compiled.memory_analysis().temp_size_in_bytes < 2**22


def test_decode_of_a_contiguous_cache(mesh):
    cache = ((4, 8, 32768, 128), jnp.bfloat16)

    def step(q, keys, values, lengths):
        rows = jnp.arange(4, dtype=jnp.int32)[:, None]
        return decode_gqa.decode_gqa(q, keys, values, rows, lengths)

    q = ((4, 1, 32, 128), jnp.bfloat16)
    _, compiled = compile_for(mesh, step, q, cache, cache, ((4,), jnp.int32))
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22
