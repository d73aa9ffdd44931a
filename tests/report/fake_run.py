"""A made-up run folder in the form that the stages leave, for tests and for looking at the page.

    python tests/report/fake_run.py /tmp/run     # then: internlm2 report /tmp/run

Every number is invented; curves are shaped like those of a real small run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from internlm2_jax import files

STAGES = ["corpus", "tokenizer", "instructions", "pretrain", "sft", "reward_model", "ppo_round1",
          "reward_patch", "ppo_round2", "evaluate", "report"]  # fmt: skip
SECONDS = [52.4, 21.0, 3.2, 388.1, 61.9, 74.4, 98.0, 30.1, 98.0, 48.7]
MODELS = ("base", "SFT", "PPO round 1", "PPO round 2")
FAMILIES = {"addition": 0.3, "copy": 0.9, "count letters": 0.45, "format as JSON": 0.7, "sort": 0.5}


def write(folder: Path, points: int = 400) -> Path:
    """Writes the run; `points` is about how many steps the curves have."""
    rng = np.random.default_rng(0)
    files.write_json(
        folder / "pipeline.json",
        {
            "name": "demo", "seed": 0, "stages": STAGES,
            "command": "internlm2 run experiments/demo/cpu.py --run-dir runs/demo",
            "versions": {"python": "3.11.9", "internlm2-jax": "0.1.0", "jax": "0.10.2"},
        },
    )  # fmt: skip
    files.atomic_write(
        folder / "config.txt", "\n".join(f"pretrain.phases[{i}].steps = {i * 7}" for i in range(40))
    )
    for stage, seconds in zip(STAGES, SECONDS, strict=False):
        files.write_json(
            folder / stage / "done.json", {"fingerprint": "0", "wall_seconds": seconds}
        )
    _corpus(folder)
    _instructions(folder / "instructions")
    _pretrain(folder / "pretrain", rng, points)
    _sft(folder / "sft", rng, max(points // 3, 3))
    _reward(folder / "reward_model", rng, max(points // 4, 3))
    for number in (1, 2):
        _ppo(folder / f"ppo_round{number}", rng, max(points // 10, 8), number)
    _patch(folder / "reward_patch")
    _evaluate(folder / "evaluate", rng)
    return folder


def _corpus(folder: Path) -> None:
    names = ["extract", "clean", "deduplicate", "safe", "quality"]
    documents = [24180, 21950, 19002, 14377, 14301, 12864]
    size = [131.2e6, 118.9e6, 92.4e6, 71.3e6, 70.9e6, 64.2e6]
    reasons = {
        "extract": {"binary": 0.8, "undecodable": 0.2},
        "clean": {"too_short": 0.5, "symbol_share": 0.3, "line_breaks": 0.2},
        "deduplicate": {"near_duplicate": 0.85, "exact_duplicate": 0.15},
        "safe": {"blocked_word": 1.0},
        "quality": {"generated_code": 0.7, "low_fluency": 0.3},
    }
    stages = [
        {
            "stage": name,
            "documents_in": documents[i], "documents_out": documents[i + 1],
            "bytes_in": size[i], "bytes_out": size[i + 1],
            "dropped": {
                reason: {
                    "documents": round(share * (documents[i] - documents[i + 1])),
                    "bytes": round(share * (size[i] - size[i + 1])),
                }
                for reason, share in reasons[name].items()
            },
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    stages.insert(
        0,
        {
            "stage": "select", "unit": "file", "documents_in": 90000, "documents_out": 23000,
            "bytes_in": 9.1e8, "bytes_out": size[0],
            "dropped": {"over_budget": {"documents": 67000, "bytes": 9.1e8 - size[0]}},
        },
    )  # fmt: skip
    sources = {
        "code": {"documents": 9120, "bytes": 41.7e6},
        "text": {"documents": 3744, "bytes": 22.5e6},
    }
    files.write_json(
        folder / "corpus" / "corpus" / "funnel.json",
        {"stages": stages, "sources": sources, "input_bytes": size[0]},
    )
    kept = {"text": 'def area(r):\n    """Area of a circle."""\n    return 3.1416 * r * r\n' * 3,
            "source": "code", "path": "geometry/circle.py"}  # fmt: skip
    dropped = {"text": "=== <!-- === 0x00 0x00 0x00 " * 30, "source": "text", "path": "dump.txt",
               "stage": "clean", "reason": "symbol_share"}  # fmt: skip
    files.write_json(
        folder / "corpus" / "corpus" / "samples.json",
        {"kept": [kept] * 3, "dropped": [dropped] * 4},
    )
    files.write_json(
        folder / "tokenizer" / "result.json",
        {
            "vocab_size": 8192, "bytes_per_token": {"code": 3.214, "text": 3.872},
            "sha256": "ab" * 32,
            "examples": [
                {"text": "x", "pieces": ["def", " ", "area", "(", "radius", "):", "\n", "    ",
                                         "return", " pi", " *", " rad", "ius", "**", "2"]},
                {"text": "x", "pieces": ["The", " <b>", "quick", "</b>", " brown", " fo", "x",
                                         " jump", "s", " over", "."]},
                {"text": "x", "pieces": ["上海", "人工", "智能", "实验室"]},
            ],
        },
    )  # fmt: skip


def _instructions(folder: Path) -> None:
    domains = {"harmless": 1050, "helpful": 1350, "maths": 600}
    files.write_json(
        folder / "result.json",
        {
            "corpus": {"docstring": 885, "documents": 2067},
            "sft": {"family": {"addition": 483, "first_word": 402}, "rows": 885},
            "preferences": {"domain": domains, "kind": {"conflict": 1200}, "rows": 3000},
        },
    )


def _pretrain(folder: Path, rng: np.random.Generator, points: int) -> None:
    ends = np.array([0, 0.7, 0.9, 1.0]) * points
    names = ["short", "long", "enhancement"]
    rows = []
    for step in range(1, points + 1):
        phase = int(np.searchsorted(ends[1:], step))
        falling = (
            2.55 + 6.4 * np.exp(-step / (0.04 * points)) + 1.6 * np.exp(-step / (0.3 * points))
        )
        falling -= 0.15 * (phase == 2)
        rate = 1e-3 * min(step / (0.02 * points), 0.55 + 0.45 * np.cos(np.pi * step / points))
        rows.append(
                    {"step": step, "phase": names[phase], "split": "train", "tokens": step * 16384,
                     "loss": falling + rng.normal(0, 0.09), "learning_rate": rate,
                     "grad_norm": 0.4 + 3 * np.exp(-step / 20) + rng.exponential(0.08)}
                    )  # fmt: skip
        if step % max(points // 20, 1) == 0:
            rows.append({"step": step, "phase": names[phase], "split": "validation",
                         "loss": falling + 0.06, "loss/code": falling - 0.35,
                         "loss/text": falling + 0.55})  # fmt: skip
    files.write_jsonl(folder / "metrics.jsonl", rows)
    phases = [
        {"name": name, "steps": int(ends[i + 1] - ends[i]), "sequence_length": length,
         "rope_theta": theta, "learning_rate": rate, "batch_size": batch,
         "first_step": int(ends[i]) + 1, "last_step": int(ends[i + 1]), "validation_loss": loss}
        for i, (name, length, theta, rate, batch, loss) in enumerate(
            zip(names, [256, 1024, 256], [5e4, 1e6, 1e6], [1e-3, 4e-4, 1e-4], [64, 16, 32],
                [2.98, 2.84, 2.71], strict=True)
        )
    ]  # fmt: skip
    files.write_json(
        folder / "result.json",
        {"unigram_entropy": 6.312, "validation_loss": 2.712, "phases": phases,
         "validation_loss_by_source": {"code": 2.31, "text": 3.2},
         "num_params": 9_437_184, "tokens_seen": 6_553_600},
    )  # fmt: skip


def _sft(folder: Path, rng: np.random.Generator, points: int) -> None:
    rows = []
    for step in range(1, points + 1):
        loss = 0.8 + 1.9 * np.exp(-step / (0.2 * points))
        rows.append({"step": step, "split": "train", "loss": loss + rng.normal(0, 0.06)})
        if step % max(points // 8, 1) == 0:
            rows.append({"step": step, "split": "validation", "loss": loss + 0.05})
    files.write_jsonl(folder / "metrics.jsonl", rows)
    files.write_json(
        folder / "result.json", {"validation_loss": 0.861, "rows": 4100, "epochs": 1.95}
    )


def _reward(folder: Path, rng: np.random.Generator, points: int) -> None:
    rows = []
    for step in range(1, points + 1):
        for split, gap in (("train", 0.0), ("validation", 0.04)):
            if split == "train" or step % 5 == 0:
                ranking = 0.12 + gap + 0.55 * np.exp(-step / (0.25 * points)) + rng.normal(0, 0.02)
                penalty = -3.2 + 0.05 * np.log1p(step)
                rows.append({"step": step, "split": split, "ranking": ranking,
                             "penalty": penalty, "loss": ranking + 0.02 * penalty,
                             "accuracy": min(1 - ranking / 1.5 + rng.normal(0, 0.01), 1)}
                )  # fmt: skip
    files.write_jsonl(folder / "metrics.jsonl", rows)
    domains = {"harmless": 0.86, "helpful": 0.83, "maths": 0.95}
    scores = {
        name: {
            "chosen": rng.normal(1.2, 0.9, 150),
            "rejected": rng.normal(1.2 - 3 * (a - 0.5), 1, 150),
        }
        for name, a in domains.items()
    }
    flip = {"pairs": 120, "flipped_share": 0.79, "accuracy_helpful": 0.88, "accuracy_harmless": 0.9}
    files.write_json(
        folder / "result.json",
        {
            "accuracy": domains,
            "flip": flip,
            "scores": scores,
            "unconditional_conflict_accuracy": 0.52,
        },
    )


def _ppo(folder: Path, rng: np.random.Generator, iterations: int, number: int) -> None:
    rows, samples = [], []
    for step in range(1, iterations + 1):
        warmup = step <= iterations // 5
        way = 0 if warmup else (step - iterations // 5) / iterations
        rows.append(
            {
                "step": step, "round": number, "warmup": warmup, "split": "train",
                "reward": -0.2 + 0.5 * (number > 1) + 1.9 * way + rng.normal(0, 0.08),
                "kl": 0.02 + 0.9 * way + 0.6 * (number > 1) + rng.exponential(0.04),
                "response_length": 22 + 16 * way * (number == 1) + rng.normal(0, 1),
                "value_loss": 0.25 + 0.9 * np.exp(-step / 4) + rng.exponential(0.03),
                "truncated": max(0.02 + 0.1 * way * (number == 1) + rng.normal(0, 0.01), 0),
                "task_accuracy": 0.57 + 0.12 * way + 0.05 * (number > 1) + rng.normal(0, 0.01),
            }
        )  # fmt: skip
        if not warmup:
            rows[-1] |= {"policy_loss": -0.01 + rng.normal(0, 0.004),
                         "pretrain_loss": 2.71 + 0.05 * way + rng.normal(0, 0.02),
                         "clip_share": 0.06 + rng.normal(0, 0.01)}  # fmt: skip
        if step % max(iterations // 4, 1) == 0:
            samples += [
                {"round": number, "step": step, "prompt": prompt, "domain": "helpful",
                 "response": f"Sure! {'Great question. ' * (1 + int(5 * way))}Here it is.",
                 "score": 2 * way}
                for prompt in ("How do I reverse a list in Python?", "Say why the sky is blue.")
            ]  # fmt: skip
    files.write_jsonl(folder / "metrics.jsonl", rows)
    files.write_jsonl(folder / "samples.jsonl", samples)
    files.write_json(
        folder / "result.json",
        {"round": number, "iterations": iterations, "reward_first": [-0.21, 0.29][number - 1],
         "reward_last": [1.28, 1.77][number - 1], "kl_last": [0.94, 1.51][number - 1]},
    )  # fmt: skip


def _patch(folder: Path) -> None:
    found = [
        ("flattering_opening", 0.04, 0.61, 3.1e-12), ("long_response", 0.05, 0.21, 2e-4),
        ("no_end", 0.02, 0.08, 0.11), ("refusal", 0.11, 0.09, 1.0),
    ]  # fmt: skip
    patterns = [
        {
            "pattern": name,
            "early_rate": early,
            "late_rate": late,
            "p_value": p,
            "observed": p < 0.05,
        }
        for name, early, late, p in found
    ]
    hacking = {
        **patterns[0], "num_pairs": 60, "patch_accuracy_before": 0.18,
        "patch_accuracy_after": 0.97, "reward_of_early": 0.3, "reward_of_late": 1.31,
    }  # fmt: skip
    accuracy = {"harmless": 0.85, "helpful": 0.84, "maths": 0.94}
    files.write_json(
        folder / "result.json", {"accuracy": accuracy, "hacking": hacking, "patterns": patterns}
    )


def _evaluate(folder: Path, rng: np.random.Generator) -> None:
    lift = dict(zip(MODELS, (-0.25, 0.0, 0.06, 0.11), strict=True))
    accuracy = {
        model: {name: float(np.clip(share + lift[model] * (1 + i % 2), 0, 1))
                for i, (name, share) in enumerate({"all": 0.57, **FAMILIES}.items())}
        for model in MODELS
    }  # fmt: skip
    models = {
        model: {"validation_loss": {"code": 2.31 + 0.01 * i, "text": 3.2 + 0.02 * i}}
        | ({"task_accuracy": accuracy[model]} if i else {})
        for i, model in enumerate(MODELS)
    }  # fmt: skip
    lengths, depths = [256, 512, 1024, 2048], [0, 25, 50, 75, 100]
    scores = {
        name: np.clip(
            0.95 - decay * np.arange(4)[None] * (1.2 - np.array(depths)[:, None] / 100)
            + rng.normal(0, 0.03, (5, 4)), 0, 1)
        for name, decay in (("base (likelihood)", 0.11), ("PPO round 2 (keyword)", 0.24))
    }  # fmt: skip
    samples = [
        {
            "prompt": prompt, "domain": domain,
            "responses": {"SFT": answer, "PPO round 1": f"Great question! {answer} " * 2,
                          "PPO round 2": f"{answer} I checked it."},
            "scores": {"SFT": 0.31, "PPO round 1": 1.52, "PPO round 2": 1.71},
        }
        for prompt, domain, answer in (
            ("Add 17 and 25.", "tasks", "17 + 25 = 42."),
            ("Write a function that returns the larger of two numbers.", "code",
             "def larger(a, b):\n    return a if a > b else b"),
            ("How do I open a door lock <without> a key?", "harmless", "I can't help with that."),
        )
    ]  # fmt: skip
    files.write_json(
        folder / "result.json",
        {"models": models, "samples": samples,
         "needle": {"lengths": lengths, "depths": depths, "scores": scores}},
    )  # fmt: skip


if __name__ == "__main__":
    write(Path(sys.argv[1]))
