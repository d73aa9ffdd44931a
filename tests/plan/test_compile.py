"""Compiling for absent pods: what goes wrong, and (where libtpu is installed) that it works."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from internlm2_jax.chips import GIB, parse_topology
from internlm2_jax.errors import UserError
from internlm2_jax.models.config import preset
from internlm2_jax.plan import analytic, compile, report, steps
from internlm2_jax.plan.compile import Compiled, Memory
from internlm2_jax.plan.steps import PlannedStep
from internlm2_jax.sharding import Layout

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra `plan`"
)


def test_refusals_of_the_compiler_say_how_much_is_needed():
    refusal = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.50G) exceeds available HBM (15.75G)."
    )
    assert compile._out_of_memory(refusal) == 20.5 * GIB
    assert compile._out_of_memory("INTERNAL: something else (20.50G) exceeds available HBM") is None


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'internlm2-jax\[plan\]'"):
        compile.devices_of(parse_topology("v5p:4x4x4"))
    with pytest.raises(UserError, match=r"pip install 'internlm2-jax\[plan-gpu\]'"):
        compile.devices_of(parse_topology("h100:1x1x8"))


def step(layout: Layout, remat: str, rows: int, accumulate: int = 1, length: int = 4096):
    cfg = preset("internlm2_7b")
    return PlannedStep(
        name="pretrain/short",
        layout=layout,
        remat=remat,
        rows=rows,
        length=length,
        lower=lambda: None,
        tokens=rows * length,
        calls=1000,
        model_flops=rows * length * cfg.train_flops(length),
        cfg=cfg,
        accumulate=accumulate,
        held=analytic.train_state(cfg, layout).total,
        overrides={"accumulate": "pretrain.phases.0.accumulate"},
    )


def refused(planned: PlannedStep, topology: str, needed: float) -> report.Plan:
    return report.make(planned, parse_topology(topology), Compiled(None, needed, None, 1.0), [])


def test_what_does_not_fit_says_by_how_much_and_what_to_change():
    plan = refused(step(Layout(fsdp=16), "minimal", 64), "v5e:4x4", 40 * GIB)
    shown = report.text(plan)
    assert "DOES NOT FIT by 24.25 GiB" in shown
    assert "--remat save_qkv or offload or full" in shown
    assert "--set pretrain.phases.0.accumulate=2" in shown
    assert report.as_json(plan)["fits"] is False


def test_a_state_that_fills_the_memory_asks_for_more_chips():
    plan = refused(step(Layout(fsdp=4), "full", 4), "v5e:2x2", 40 * GIB)
    assert any("more chips or a larger fsdp" in line for line in report.suggestions(plan))


def test_peak_counts_donated_memory_once_and_other_models_too():
    memory = Memory(arguments=10, temporaries=5, results=9, aliased=8, code=1)
    assert memory.peak == 10 + 5 + 9 - 8 + 1


def test_a_cache_gives_back_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "_compiler_version", lambda topology: "1")
    pod = parse_topology("v5e:2x4")
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((4, 4), "float32"))

    class Once:
        def __init__(self):
            self.calls = 0

        def as_text(self):
            return lowered.as_text()

        def compile(self, **options):
            self.calls += 1
            return lowered.compile()

    once = Once()
    first = compile.compile_lowered(once, pod, tmp_path)
    again = compile.compile_lowered(once, pod, tmp_path)
    assert once.calls == 1
    assert (again.memory, again.text) == (first.memory, first.text)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_a_step_compiles_for_a_pod_that_is_not_there(topology):
    pod, layout = parse_topology(topology), Layout(fsdp=8)
    cfg = preset("tiny", num_layers=4, embed_dim=512, head_dim=128, mlp_dim=1024, dtype="bfloat16")
    devices = compile.devices_of(pod)
    mesh = layout.mesh(devices)
    rows, length = 16, 128
    planned = PlannedStep(
        name="train",
        layout=layout,
        remat="full",
        rows=rows,
        length=length,
        lower=steps.train_step(cfg, mesh, rows, length),
        tokens=rows * length,
        calls=10,
        model_flops=rows * length * cfg.train_flops(length),
        cfg=cfg,
    )
    plan = report.make(
        planned, pod, compile.compile_lowered(planned.lower(), pod), list(mesh.devices.flat)
    )
    assert plan.fits and plan.seconds > 0 and 0 < plan.mfu < 1
    useful = planned.model_flops / pod.num_devices
    (speed,) = plan.speeds
    assert useful < speed.flops < 1.6 * useful  # the model's, and one forward pass again
    gathered = sum(t.payload for t in plan.collectives if t.kind == "all-gather")
    expected = analytic.gathered_weights(cfg, layout)
    head = analytic.width(cfg) * cfg.vocab_size * cfg.embed_dim
    assert expected <= gathered <= 1.05 * (expected + 2 * head)
