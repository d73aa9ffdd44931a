"""Measures every stage's model on the same held-out material (InternLM2 section 5)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm2_jax import files
from internlm2_jax.data import documents
from internlm2_jax.data.manifest import load_split
from internlm2_jax.data.packing import PackedSource
from internlm2_jax.data.pipeline import first_batches
from internlm2_jax.data.tasks import Task
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.evals.needle import needle_grid
from internlm2_jax.evals.subject import Subject
from internlm2_jax.evals.verifiable import task_accuracy
from internlm2_jax.infer.chat import respond
from internlm2_jax.rlhf.scoring import Scorer, load_domains
from internlm2_jax.train.checkpoint import load_model
from internlm2_jax.train.objectives import evaluate_loss

CHAT_FRAME = 16  # tokens that ChatML puts around a needle prompt


def evaluate(
    folder: Path,
    *,
    tokenizer: Path,
    corpus: Path,
    instructions: Path,
    reward: Path,
    base: Path,
    chat: Mapping[str, Path],
    needle_lengths: Sequence[int],
    needle_depths: Sequence[int] = (0, 25, 50, 75, 100),
    needle_repeats: int = 6,
    max_new_tokens: int = 48,
    validation_tokens: int = 32768,
    num_samples: int = 12,
    seed: int = 0,
) -> None:
    """Tasks, losses, samples and needles for the base model and the `chat` models {name: stage}.

    The base model's needle score is "likelihood": the share of wrong answers that the right one
    beats (chance 1/2), which a model that cannot follow instructions yet can show; the chat models
    must say the answer ("keyword"). `needle_lengths` are in tokens, question included.
    """
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    eval_tasks = [
        Task(**row["task"]) for row in files.read_jsonl(instructions / "eval_tasks.jsonl")
    ]
    requests = files.read_jsonl(instructions / "eval_requests.jsonl")
    asked = [
        *requests[: num_samples // 2],
        *files.read_jsonl(instructions / "eval_tasks.jsonl")[: num_samples - num_samples // 2],
    ]
    held_out = [d.text for d in documents.read(corpus / "corpus", "validation")]
    reward_model, reward_params = load_model(reward)
    scorer = Scorer(reward_model, vocabulary, 256, domains=load_domains(reward))
    validation = load_split(tokenizer / "tokens", "validation")

    models: dict[str, dict[str, Any]] = {}
    needles: dict[str, list[list[float]]] = {}
    samples: list[dict[str, Any]] = [
        {
            "prompt": row["messages"][-1]["content"],
            "domain": row["domain"],
            "responses": {},
            "scores": {},
        }
        for row in asked
    ]
    for name, stage in {"base": base, **chat}.items():
        model, params = load_model(stage)
        measure = evaluate_loss(model)
        losses = {
            source: measure(
                params,
                first_batches(
                    PackedSource(tokens, model.cfg.max_position_embeddings), validation_tokens
                ),
            )
            for source, tokens in validation.items()
            if len(tokens)
        }
        models[name] = {"validation_loss": losses}
        grid = functools.partial(
            needle_grid,
            vocabulary,
            held_out,
            needle_lengths,
            needle_depths,
            repeats=needle_repeats,
            buffer=max_new_tokens + CHAT_FRAME,
            seed=seed,
        )
        if stage == base:
            subject = Subject(model, params, vocabulary)
            scores = grid(score="likelihood", likelihood=subject.logprobs)
            needles[f"{name} (likelihood)"] = scores.tolist()
            continue

        generate = functools.partial(
            respond, model, params, vocabulary, max_new_tokens=max_new_tokens
        )
        labelled = functools.partial(generate, label=f"tasks, {name}")
        models[name]["task_accuracy"] = task_accuracy(labelled, eval_tasks)
        answers = generate([row["messages"] for row in asked])
        scored = scorer(
            reward_params,
            [(r["domain"], r["messages"], a) for r, a in zip(asked, answers, strict=True)],
        )
        for sample, answer, score in zip(samples, answers, scored, strict=True):
            sample["responses"][name] = answer
            sample["scores"][name] = float(score)
        needles[f"{name} (keyword)"] = grid(score="keyword", generate=generate).tolist()

    files.write_json(
        folder / "result.json",
        {
            "models": models,
            "needle": {"lengths": needle_lengths, "depths": needle_depths, "scores": needles},
            "samples": samples,
        },
    )
