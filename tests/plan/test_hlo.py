"""The reader of compiled HLO on texts whose figures are worked out by hand."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from internlm2_jax.plan import flops, groups, hlo, hlo_text, loops, traffic

MESH = {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
DATA = Path(__file__).parent / "data"


def module(*lines: str, more: str = "") -> hlo_text.Module:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo_text.parse(
        f"HloModule m\n\n{more}\n\nENTRY %main (p: s32[]) -> s32[] {{\n{body}\n}}\n"
    )


def program(*lines: str, more: str = "") -> hlo.Program:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.read(
        f"HloModule m\n\n{more}\n\nENTRY %main (p: s32[]) -> s32[] {{\n{body}\n}}\n", MESH
    )


def entry(m: hlo_text.Module) -> hlo_text.Computation:
    return m.computations[m.entry]


# ------------------------------------------------------------------------------- text


def test_shapes_with_layouts_spaces_and_tuples():
    result = hlo_text.parse_result(
        "(bf16[2,512]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/(f32[], s32[4]{0:S(5)}), pred[3])"
    )
    a, b, c, d = hlo_text.leaves(result)
    assert (a.dims, a.space, a.bytes) == ((2, 512), 1, 2048)
    assert (b.bytes, c.space, d.bytes) == (4, hlo_text.HOST, 3)


def test_four_bit_elements_are_half_a_byte():
    assert hlo_text.parse_result("s4[5]{0}").bytes == 3


def test_a_computation_may_say_on_which_thread_it_runs():
    text = (
        '%f (p: s32[]) -> s32[] {\n  ROOT %p = s32[] parameter(0)\n}, execution_thread="sparsecore"'
    )
    assert "f" in module("ROOT %q = s32[] parameter(0)", more=text).computations


def test_not_hlo_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo_text.parse("hello\n")


# ------------------------------------------------------------------------------ groups


def of(text: str) -> np.ndarray:
    m = module(f"ROOT %a = f32[8]{{0}} all-reduce(%p), replica_groups={text}, to_apply=%add")
    return groups.groups_of(entry(m).root, 8)


@pytest.mark.parametrize(
    ("text", "rows", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]], "fsdp"),
        ("[1,8]<=[8]", [list(range(8))], "fsdp+tensor"),
        ("{}", [list(range(8))], "fsdp+tensor"),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]], "fsdp"),
        ("mesh['a'=4,'b'=2] {'b','a'}", [[0, 2, 4, 6, 1, 3, 5, 7]], "fsdp+tensor"),
        ("mesh['a'=8] {'a':(1)4}", [[0, 2, 4, 6], [1, 3, 5, 7]], "fsdp"),
        ("mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ("{{0,4},{1,5},{2,6},{3,7}}", [[0, 4], [1, 5], [2, 6], [3, 7]], "fsdp/2"),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", [[i] for i in range(8)], "none"),
    ],
)
def test_groups_and_their_axes(text, rows, axes):
    found = of(text)
    assert found.tolist() == rows
    assert groups.axes_of(found, MESH) == axes


def test_unknown_form_of_groups_is_an_error():
    with pytest.raises(ValueError, match="form not known"):
        of("<something new>")


# ------------------------------------------------------------------------------- flops


def convolution(lhs: str, rhs: str, out: str, attributes: str) -> float:
    m = module(
        f"%a = {lhs} parameter(0)",
        f"%b = {rhs} parameter(1)",
        f"ROOT %c = {out} convolution(%a, %b), {attributes}",
    )
    return flops.flops_of(m, entry(m), entry(m).root)


def test_matrix_product_as_a_plain_convolution():
    got = convolution("bf16[64,32]", "bf16[32,16]", "f32[64,16]", "dim_labels=bf_io->bf")
    assert got == 2 * 64 * 32 * 16


def test_padding_of_a_window_is_no_work():
    # [B, T, D] x [D, N, H] as libtpu writes it: a window of 4 over a side of 1, padded by 3.
    got = convolution(
        "bf16[2,512,512,1]",
        "bf16[512,4,64,1]",
        "bf16[2,512,4,64]",
        "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
    )
    assert got == 2 * 2 * 512 * 512 * 4 * 64


def test_batch_dimensions_as_dilated_windows_are_no_work():
    # Scores of a 2 x 2 batch of heads: [T, H] x [S, H] for each.
    got = convolution(
        "bf16[2,2,2,128,64]",
        "bf16[2,2,512,64,1]",
        "f32[2,2,2,128,512]",
        "window={size=2x2x1 lhs_dilate=2x2x1}, dim_labels=012bf_01oi2->012bf",
    )
    assert got == 2 * (2 * 2) * 2 * 128 * 64 * 512


def test_dot_and_kernels_with_a_cost_estimate():
    estimate = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"300","x":1}}}'
    m = module(
        "%a = f32[4,8,16] parameter(0)",
        "%b = f32[4,16,32] parameter(1)",
        "%c = f32[4,8,32] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}",
        f'ROOT %k = f32[4] custom-call(%c), custom_call_target="tpu_custom_call", {estimate}',
    )
    where = entry(m)
    assert flops.flops_of(m, where, where["c"]) == 2 * 4 * 8 * 16 * 32
    assert flops.flops_of(m, where, where["k"]) == 300
    assert not flops.unknown_kernel(where["k"])


def test_an_operand_that_comes_through_another_fusion_is_read():
    text = """
%cast (x: bf16[64,32]) -> bf16[64,32] {
  %x = bf16[64,32] parameter(0)
  ROOT %y = bf16[64,32] bitcast(%x)
}

%product (w: bf16[64,32], v: bf16[8,64]) -> bf16[8,32] {
  %w = bf16[64,32] parameter(0)
  %v = bf16[8,64] parameter(1)
  %f = bf16[64,32] fusion(%w), kind=kLoop, calls=%cast
  ROOT %d = bf16[8,32] dot(%v, %f), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    m = module(
        "%a = bf16[64,32] parameter(0)",
        "%b = bf16[8,64] parameter(1)",
        "ROOT %r = bf16[8,32] fusion(%a, %b), kind=kOutput, calls=%product",
        more=text,
    )
    assert traffic.hbm_bytes(m, entry(m), entry(m)["r"]) == 2 * (64 * 32 + 8 * 64 + 8 * 32)


def test_a_kernel_moves_what_its_estimate_says():
    """Not all of an operand that it reads a part of."""
    estimate = '{"custom_call_config":{"cost_estimate":{"bytes_accessed":"96"}}}'
    m = module(
        "%pages = bf16[64,128,128] parameter(0)",
        'ROOT %k = f32[4] custom-call(%pages), custom_call_target="tpu_custom_call", '
        f"backend_config={estimate}",
    )
    assert traffic.hbm_bytes(m, entry(m), entry(m)["k"]) == 96


def test_a_kernel_without_an_estimate_is_named():
    found = program('ROOT %flash.1 = f32[4] custom-call(), custom_call_target="tpu_custom_call"')
    assert found.warnings == (
        "1 calls of kernel flash tell no cost_estimate: their work counts as 0",
    )


# ------------------------------------------------------------------------------- loops

LOOP = """
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(STEP)
  %next = s32[] add(%i, %one)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %y = f32[8]{0} all-reduce(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %y)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(10)
  ROOT %lt = pred[] compare(%j, %end), direction=LT
}
"""
CALLER = (
    "%p = f32[8]{0} parameter(0)",
    "%start = s32[] constant(1)",
    "%init = (s32[], f32[8]{0}) tuple(%start, %p)",
    "ROOT %w = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body",
)


@pytest.mark.parametrize(("step", "trips"), [(1, 9), (2, 5), (9, 1)])
def test_trip_count_from_start_step_and_end(step, trips):
    m = module(*CALLER, more=LOOP.replace("STEP", str(step)))
    assert loops.trip_count(m, entry(m), entry(m).root) == trips
    found = program(*CALLER, more=LOOP.replace("STEP", str(step))).collectives()
    assert [(t.kind, t.axes, t.count, t.payload) for t in found] == [
        ("all-reduce", "fsdp", trips, trips * 32)
    ]
    assert found[0].sent == trips * 2 * 3 / 4 * 32


def test_known_trip_count_is_believed():
    known = ', backend_config={"known_trip_count":{"n":"7"}}'
    m = module(*CALLER[:-1], CALLER[-1] + known, more=LOOP.replace("STEP", "1"))
    assert loops.trip_count(m, entry(m), entry(m).root) == 7


def test_a_loop_that_ends_on_data_counts_once_and_says_so():
    caller = [line.replace("constant(1)", "parameter(1)") for line in CALLER]
    found = program(*caller, more=LOOP.replace("STEP", "1"))
    assert found.collectives()[0].count == 1
    assert "1 loops end on data" in found.warnings[0]


def test_loops_in_loops_multiply():
    outer = LOOP.replace("%body", "%outer").replace("%condition", "%until").replace("STEP", "3")
    inner = "%y = f32[8]{0} copy(%x)\n  %w = (s32[], f32[8]{0}) while(%s2), condition=%condition, "
    inner += "body=%body\n  %zero = s32[] constant(0)\n  %s2 = (s32[], f32[8]{0}) tuple(%zero, %y)"
    all_reduce = (
        "%y = f32[8]{0} all-reduce(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add"
    )
    outer = outer.replace(all_reduce, inner)
    caller = [line.replace("%condition", "%until").replace("%body", "%outer") for line in CALLER]
    found = program(*caller, more=LOOP.replace("STEP", "1") + outer)
    assert found.collectives()[0].count == 3 * 10  # 1, 4, 7 outside; 0 .. 9 inside


# ------------------------------------------------------------------------- collectives


def test_asynchronous_pairs_count_once():
    found = program(
        "%p = bf16[8]{0} parameter(0)",
        "%s = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%p), replica_groups=[2,4]<=[4,2]T(1,0), "
        "dimensions={0}",
        "ROOT %d = bf16[32]{0} all-gather-done(%s)",
    )
    (total,) = found.collectives()
    assert (total.kind, total.asynchronous, total.count) == ("all-gather", True, 1)
    assert (total.payload, total.sent) == (64, 48)


def test_what_crosses_slices_is_a_send_to_the_host_and_a_receive():
    """As libtpu writes the all-reduce of data=2 over two slices of 4 chips."""
    megascale = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.7_0"'
        ',_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = (
        "%x = bf16[8,128]{1,0} parameter(0)",
        "%y = f32[8]{0} parameter(1)",
        "%t = token[] after-all()",
        f"%r = (bf16[8,128]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, {megascale}",
        f"%s = (bf16[8,128]{{1,0}}, u32[], token[]) send(%x, %t), channel_id=2, {megascale}",
        "%sd = token[] send-done(%s), channel_id=2, is_host_transfer=true",
        "%rd = (bf16[8,128]{1,0}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true",
        "%plain = (f32[8]{0}, u32[], token[]) send(%y, %t), channel_id=3, is_host_transfer=true",
    )
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule m\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    found = hlo.read(text, {"data": 2, "fsdp": 4, "context": 1, "tensor": 1})
    (total,) = found.collectives()
    assert (total.kind, total.axes, total.asynchronous, total.count) == (
        "all-reduce", "data", True, 1,
    )  # fmt: skip
    assert total.payload == total.sent == 2048
    collective, wait = [e for e in found.events if not isinstance(e, hlo.Work)]
    assert collective.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert wait.names == (collective.name,) == ("all-reduce.7_0",)


def test_permutations_and_generic_async():
    inside = """
%wrapped (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} all-to-all(%q), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}
"""
    found = program(
        "%p = f32[16]{0} parameter(0)",
        "%c = f32[16]{0} collective-permute(%p), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}",
        "%s = ((f32[16]{0}), f32[16]{0}, s32[]) async-start(%c), calls=%wrapped",
        "ROOT %d = f32[16]{0} async-done(%s)",
        more=inside,
    )
    rows = {(t.kind, t.axes, t.asynchronous, t.payload, t.sent) for t in found.collectives()}
    assert rows == {
        ("collective-permute", "fsdp", False, 64, 64),
        ("all-to-all", "tensor", True, 64, 32),
    }


def test_libtpu_reduce_scatter_is_a_fusion():
    inside = """
%all-reduce-scatter (q: f32[16,4]) -> f32[4,4] {
  %q = f32[16,4]{1,0} parameter(0)
  %r = f32[16,4]{1,0} all-reduce(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %s = f32[4,4]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={4,4}
}
"""
    (total,) = program(
        "%p = f32[16,4]{1,0} parameter(0)",
        "ROOT %f = f32[4,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter",
        more=inside,
    ).collectives()
    assert (total.kind, total.axes, total.payload, total.sent) == (
        "reduce-scatter",
        "fsdp",
        256,
        192,
    )


# ----------------------------------------------------------------------------- traffic


def moved(*lines: str, more: str = "") -> int:
    m = module(*lines, more=more)
    return traffic.hbm_bytes(m, entry(m), entry(m).root)


def test_on_chip_memory_is_free():
    assert moved("%p = f32[8]{0} parameter(0)", "ROOT %n = f32[8]{0:S(1)} negate(%p)") == 32


def test_a_slice_of_stacked_parameters_counts_the_slice():
    inside = """
%layer (q: f32[32,8], i: s32[]) -> bf16[8] {
  %q = f32[32,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %c = bf16[32,8]{1,0} convert(%q)
  %s = bf16[1,8]{1,0} dynamic-slice(%c, %i, %zero), dynamic_slice_sizes={1,8}
  ROOT %b = bf16[8]{0} bitcast(%s)
}
"""
    got = moved(
        "%p = f32[32,8]{1,0} parameter(0)",
        "%i = s32[]{:S(6)} parameter(1)",
        "ROOT %f = bf16[8]{0} fusion(%p, %i), kind=kLoop, calls=%layer",
        more=inside,
    )
    assert got == 8 * 4 + 8 * 2


def test_an_update_in_place_counts_the_update():
    got = moved(
        "%cache = bf16[64,128]{1,0} parameter(0)",
        "%row = bf16[1,128]{1,0} parameter(1)",
        "%i = s32[]{:S(6)} parameter(2)",
        "ROOT %u = bf16[64,128]{1,0} dynamic-update-slice(%cache, %row, %i, %i)",
    )
    assert got == 2 * 128 * 2


def test_copies_between_memories_count_the_side_in_main_memory():
    got = moved(
        "%p = f32[8]{0} parameter(0)",
        "ROOT %c = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%p)",
    )
    assert got == 32


# -------------------------------------------------------------------- real programs

# 4 layers, D 512, MLP 1408, vocabulary 2048; steps of 16 rows of 512 tokens on eight chips.
D, F, V, L, T = 512, 1408, 2048, 4, 512
ATTENTION_BLOCKS = 320  # keys that a query meets in the mean when rows are attended in 4 blocks


def stored(name: str, mesh: dict[str, int]) -> hlo.Program:
    return hlo.read(gzip.decompress((DATA / f"{name}.txt.gz").read_bytes()).decode(), mesh)


def payload(found: hlo.Program, kind: str) -> float:
    return sum(t.payload for t in found.collectives() if t.kind == kind)


def test_an_fsdp_step_of_v5e_to_the_byte():
    """libtpu 0.0.52: asynchronous gathers spread over fusions, reduce-scatters as fusions."""
    found = stored("v5e_2x4_step", {"data": 1, "fsdp": 8, "context": 1, "tensor": 1})
    layer = D * (4 + 2 + 2) * 128 + 4 * 128 * D + 3 * D * F
    # Weights in bfloat16, forward and backward; the head once; the ids of all tokens.
    assert payload(found, "all-gather") == 2 * 2 * L * layer + 2 * D * V + 4 * 16 * T
    # Gradients of blocks in bfloat16, of the head in float32.
    assert payload(found, "reduce-scatter") == 2 * L * layer + 4 * D * V
    rows = [(t.kind, t.count) for t in found.collectives() if t.asynchronous]
    assert rows == [("all-gather", 48)]  # 6 a layer and pass; the HLO mentions each 2 to 10 times
    tokens = 16 * T / 8
    products = tokens * (6 * (L * layer + D * V) + L * (2 * layer - 2 * D * F))
    # Attention forward, again, twice for the backward pass, and its scores once more.
    attention = 4.5 * tokens * L * 4 * (4 * 128) * ATTENTION_BLOCKS
    assert found.flops == pytest.approx(products + attention, rel=1e-3)
    assert found.warnings == ()


def test_a_tensor_parallel_step_of_v5p_to_the_byte():
    """The first layout of this project: axes data (4, as fsdp) and model (2, as tensor)."""
    found = stored("v5p_2x2x2_step", {"data": 4, "model": 2})
    layer = D * (8 + 4 + 4) * 64 + 8 * 64 * D + 3 * D * F
    norms = 2 * (2 * L * 2 * D + D)  # gathered too in that layout
    gathered = sum(
        t.payload for t in found.collectives() if t.kind == "all-gather" and t.axes == "data"
    )
    assert gathered == 2 * 2 * L * layer / 2 + 2 * D * V / 2 + norms
