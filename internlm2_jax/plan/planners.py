"""What each stage's loop compiles: its own functions, on the shapes that it would give them.

`PLANNERS` maps a stage's function to a generator of its steps; a stage of your own joins by an
entry there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from internlm2_jax.errors import UserError
from internlm2_jax.infer import cache as kv
from internlm2_jax.infer import engine, programs
from internlm2_jax.infer.programs import Batch
from internlm2_jax.infer.sampling import Rows, words
from internlm2_jax.models.build import Model, build
from internlm2_jax.models.config import ModelConfig
from internlm2_jax.plan import analytic, steps
from internlm2_jax.plan.steps import Choice, Context, Part, PlannedStep
from internlm2_jax.rlhf.pairs import SHORTEST
from internlm2_jax.rlhf.ppo import Updates
from internlm2_jax.sharding import Layout
from internlm2_jax.stages.pipeline import Pipeline
from internlm2_jax.stages.ppo import ppo
from internlm2_jax.stages.pretrain import pretrain
from internlm2_jax.stages.reward_model import reward_model
from internlm2_jax.stages.reward_patch import reward_patch
from internlm2_jax.stages.sft import sft
from internlm2_jax.train import optimizer as optimizers
from internlm2_jax.train.objectives import reward_model_loss
from internlm2_jax.train.step import make_train_step

Planner = Callable[[Context, str, dict[str, Any]], Iterator[PlannedStep]]


def planned(
    pipeline: Pipeline,
    devices: list[Any],
    choice: Choice | None = None,
    only: tuple[str, ...] = (),
) -> list[PlannedStep]:
    """Every step that the pipeline compiles.

    Args:
      only: names of stages or of steps ("pretrain" or "pretrain/long").
    Errors: UserError when nothing can be planned, a name is unknown, or a layout does not divide
      the devices; from `lower` of a step, when it divides neither the model nor the batch.
    """
    context = Context(pipeline, devices, choice or Choice())
    able = {n: PLANNERS[s.func] for n, s in pipeline.stages.items() if s.func in PLANNERS}
    if not able:
        known = ", ".join(sorted(function.__name__ for function in PLANNERS))
        raise UserError(
            f"no stage of this experiment can be planned (it has {', '.join(pipeline.stages)}); "
            f"those that can be are made with {known}"
        )
    stages_asked = {name.partition("/")[0] for name in only}
    for name in stages_asked - set(able):
        raise UserError(f"--only {name}: no such stage to plan; there are {', '.join(able)}")
    found = [
        step
        for name, planner in able.items()
        if not only or name in stages_asked
        for step in planner(context, name, context.settings(name))
    ]
    unknown = [n for n in only if "/" in n and n not in {step.name for step in found}]
    if unknown:
        names = ", ".join(step.name for step in found)
        raise UserError(f"--only {unknown[0]}: no such step; there are {names}")
    return [s for s in found if not only or s.name in only or s.name.partition("/")[0] in only]


def _plan_pretrain(context: Context, name: str, s: dict[str, Any]) -> Iterator[PlannedStep]:
    layout, remat = context.layout(s), context.remat(s)
    cfg = context.with_vocabulary(s["model"], s.get("tokenizer"))
    for i, phase in enumerate(s["phases"]):
        yield _training(
            context,
            f"{name}/{phase.name}",
            phase.model(cfg),
            layout,
            remat,
            rows=phase.batch_size,
            length=phase.sequence_length,
            calls=phase.steps,
            accumulate=phase.accumulate,
            z_loss=phase.z_loss,
            overrides={
                "layout": f"{name}.layout",
                "remat": f"{name}.remat",
                "batch": f"{name}.phases.{i}.batch_size",
                "accumulate": f"{name}.phases.{i}.accumulate",
            },
        )


def _plan_sft(context: Context, name: str, s: dict[str, Any]) -> Iterator[PlannedStep]:
    if s.get("lora"):
        raise UserError(f"{name} trains LoRA adapters, which are not planned; plan it without lora")
    yield _training(
        context,
        f"{name}/train",
        context.config(s["base"]),
        context.layout(s),
        context.remat(s),
        rows=s["batch_size"],
        length=s["row_length"],
        calls=s.get("steps"),
        overrides={
            "layout": f"{name}.layout",
            "remat": f"{name}.remat",
            "batch": f"{name}.batch_size",
        },
    )


def _check(name: str, layout: Layout, model: Model, batch: int, length: int | None = None) -> None:
    try:
        layout.check(model.axes, model.abstract, batch=batch, length=length)
    except UserError as error:
        raise UserError(f"{name} on {layout}: {error}") from error


def _training(
    context: Context,
    name: str,
    cfg: ModelConfig,
    layout: Layout,
    remat: Any,
    *,
    rows: int,
    length: int,
    calls: int | None,
    accumulate: int = 1,
    z_loss: float = 0.0,
    overrides: Mapping[str, str],
) -> PlannedStep:
    choice = context.choice
    rows = choice.batch or rows
    accumulate = choice.accumulate or (1 if choice.batch else accumulate)
    mesh, model = context.mesh(layout), build(cfg)
    lower = steps.train_step(
        cfg, mesh, rows, length, remat=remat, accumulate=accumulate, z_loss=z_loss
    )

    def checked() -> Any:
        """Not before the step is asked for: a setting may suit this phase and not another."""
        if rows % accumulate:
            raise UserError(
                f"{name}: accumulate {accumulate} does not divide a batch of {rows} rows"
            )
        _check(name, layout, model, rows // accumulate, length)
        return lower()

    return PlannedStep(
        name=name,
        layout=layout,
        remat=remat,
        rows=rows,
        length=length,
        lower=checked,
        tokens=rows * length,
        calls=calls,
        model_flops=rows * length * cfg.train_flops(length),
        cfg=cfg,
        accumulate=accumulate,
        held=analytic.train_state(cfg, layout).total,
        overrides=overrides,
    )


def _plan_reward(context: Context, name: str, s: dict[str, Any]) -> Iterator[PlannedStep]:
    training = s["training"]
    cfg = context.config(s["base"] if "base" in s else s["reward"])
    layout = context.layout({"layout": training.layout})
    mesh, model = context.mesh(layout), build(cfg, head="scalar")
    length = training.row_length
    rows = context.choice.batch or training.rows
    _check(name, layout, model, rows, length)
    loss = reward_model_loss(model, training.loss, training.remat)
    step = make_train_step(loss, optimizers.adamw(1e-4, b2=0.999))
    batch = {
        **steps.abstract_rows(
            mesh, (rows, length), tokens=jnp.int32, segment_ids=jnp.int32, positions=jnp.int32
        ),
        **steps.abstract_rows(
            mesh,
            (rows, length // SHORTEST),
            chosen_at=jnp.int32,
            rejected_at=jnp.int32,
            pairs=jnp.float32,
            margins=jnp.float32,
        ),
    }
    tokens = rows * length
    yield PlannedStep(
        name=f"{name}/train",
        layout=layout,
        remat=training.remat,
        rows=rows,
        length=length,
        lower=steps.lowering(mesh, step, steps.train_state(model, mesh), batch),
        tokens=tokens,
        calls=training.steps,
        model_flops=tokens * cfg.train_flops(length, "scalar"),
        cfg=cfg,
        held=analytic.train_state(cfg, layout, "scalar").total,
        overrides={"batch": f"{name}.training.tokens_per_batch"},
    )


def _plan_ppo(context: Context, name: str, s: dict[str, Any]) -> Iterator[PlannedStep]:
    """Actor and critic updates, then the rollout; four models stay on the devices throughout."""
    cfg, config = context.config(s["actor"]), s["config"]
    layout = context.layout({"layout": getattr(s.get("layouts"), "actor", "")})
    mesh = context.mesh(layout)
    actor, critic = build(cfg), build(cfg, head="scalar")
    rows = context.choice.batch or s["batch_size"]
    part, width = rows // config.minibatches, s["prompt_length"] + s["max_new_tokens"]
    _check(name, layout, actor, part)
    updates = Updates(actor, critic, config)
    params = steps.abstract_params(actor, mesh), steps.abstract_params(critic, mesh)

    def state(*names: str) -> Callable[[], Any]:
        """Those parts of the state that a step has."""
        return lambda: {n: jax.eval_shape(updates.init, *params)[n] for n in names}

    batch = {
        **steps.abstract_rows(mesh, (part, width), tokens=jnp.int32),
        **steps.abstract_rows(
            mesh,
            (part, width - 1),
            mask=jnp.bool_,
            **dict.fromkeys(
                ("logprobs", "reference", "values", "advantages", "returns"), jnp.float32
            ),
        ),
    }
    # Pre-training rows make up half as many tokens as the rollouts.
    extra_length = s["pretrain_row_length"]
    extra = max(1, rows * width // (2 * extra_length))
    extra = math.ceil(extra / layout.batch_ways) * layout.batch_ways
    kept_rows = steps.packed_rows(mesh, extra, extra_length)
    trained, frozen = (3 * analytic.FP32, analytic.FP32)
    cut = layout.param_ways
    sizes = cfg.num_params("lm"), cfg.num_params("scalar")
    held = (trained + frozen) * sum(sizes) / cut
    common: dict[str, Any] = {
        "layout": layout,
        "remat": "full",
        "cfg": cfg,
        "held": held,
        "overrides": {"batch": f"{name}.batch_size"},
    }
    calls = s["iterations"] * config.epochs * config.minibatches
    tokens = part * width
    kept = extra * extra_length * cfg.train_flops(extra_length)
    yield PlannedStep(
        name=f"{name}/actor",
        rows=part,
        length=width,
        lower=steps.lowering(
            mesh,
            Updates.actor_step,
            lambda: updates,
            state("params", "opt_state"),
            batch,
            kept_rows,
            lambda: np.float32(0.0),
        ),
        tokens=tokens,
        calls=calls,
        model_flops=tokens * cfg.train_flops(width) + kept,
        **common,
    )
    yield PlannedStep(
        name=f"{name}/critic",
        rows=part,
        length=width,
        lower=steps.lowering(
            mesh, Updates.critic_step, lambda: updates, state("critic", "critic_opt_state"), batch
        ),
        tokens=tokens,
        calls=calls,
        model_flops=tokens * cfg.train_flops(width, "scalar"),
        **common,
    )
    yield from _rollout(f"{name}/rollout", actor, params[0], mesh, rows, s, common)


def _rollout(
    name: str,
    model: Model,
    params: Any,
    mesh: Mesh,
    rows: int,
    s: dict[str, Any],
    common: dict[str, Any],
) -> Iterator[PlannedStep]:
    """The engine's two programs: prompts of one chunk, and the loop of one-token steps."""
    cfg, prompt, new = model.cfg, s["prompt_length"], s["max_new_tokens"]
    if steps.platform_of(mesh) != "cpu":  # as the engine keeps them
        params = steps.in_type(params, cfg.dtype)
    with jax.set_mesh(mesh):
        config = engine.config_for(rows, prompt, new, rows)
    count, width = config.prefill[0]
    put = functools.partial(steps.everywhere, mesh)

    def pages() -> Any:
        return jax.eval_shape(
            functools.partial(kv.pages, cfg, config.num_pages, config.page, config.cache)
        )

    def integers(*shape: int) -> Any:
        return put(shape, jnp.int32)

    def state(n: int) -> tuple[Batch, Rows]:
        batch = Batch(integers(n, config.pages_per_request), *(integers(n) for _ in range(3)))
        real = put((n,), jnp.float32)
        seed = put((n,), jnp.uint32)
        seen, mask = put((n, cfg.vocab_size), jnp.bool_), integers(n, words(cfg.vocab_size))
        return batch, Rows(real, integers(n), real, real, real, seed, seed, seen, mask)

    lower = steps.lowering(
        mesh,
        programs.prefill,
        model,
        0,
        params,
        pages,
        *state(count),
        integers(count, width),
        integers(count),
    )
    head = 2.0 * cfg.vocab_size * cfg.embed_dim
    prompts = rows * (prompt * (cfg.forward_flops(prompt) - head) + head)
    chunks = math.ceil(rows / count) * math.ceil(prompt / width)  # of the prompts of one rollout
    prefill, tokens = prompts / chunks, rows * prompt // chunks
    yield PlannedStep(
        name=f"{name}/prefill",
        rows=count,
        length=width,
        lower=lower,
        tokens=tokens,
        calls=s["iterations"] * chunks,
        model_flops=prefill,
        parts=(Part("prefill", False, tokens, 1, prefill),),
        trains=False,
        **common,
    )
    lower = steps.lowering(
        mesh,
        programs.decode,
        model,
        config.steps,
        0,
        params,
        pages,
        *state(config.slots),
        integers(config.slots),
        integers(config.slots),
        integers(config.slots, config.stop_ids),
        integers(),
        integers(),
    )
    attention = 4.0 * cfg.num_layers * cfg.num_heads * cfg.head_dim
    step = rows * (cfg.forward_flops(1) + attention * (prompt + new / 2 - 1))
    yield PlannedStep(
        name=f"{name}/decode",
        rows=rows,
        length=prompt + new,
        lower=lower,
        tokens=rows * (new - 1),
        calls=s["iterations"],
        model_flops=(new - 1) * step,
        parts=(Part("decode", True, rows, new - 1, step),),
        trains=False,
        **common,
    )


PLANNERS: dict[Callable[..., Any], Planner] = {
    pretrain: _plan_pretrain,
    sft: _plan_sft,
    reward_model: _plan_reward,
    reward_patch: _plan_reward,
    ppo: _plan_ppo,
}
