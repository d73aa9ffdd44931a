"""Problems whose answers a program can check, for GRPO; and demonstrations to begin with."""

from __future__ import annotations

import random
from pathlib import Path

from internlm2_jax import files
from internlm2_jax.data.tasks import held_out

Problem = tuple[str, str]


def problems(folder: Path, *, largest: int = 9, seed: int = 0) -> None:
    """Sums and differences of numbers up to `largest`; no result is below 0.

    Writes problems.jsonl and problems_validation.jsonl, {"messages", "check"}, and sft.jsonl and
    sft_validation.jsonl as `stages.sft` reads them. About a tenth is held out, sums in both orders.
    """
    train: list[Problem] = []
    apart: list[Problem] = []
    for a in range(largest + 1):
        for b in range(largest + 1):
            (apart if held_out(f"{min(a, b)} + {max(a, b)}") else train).append(
                (f"{a} + {b} =", str(a + b))
            )
            if a >= b:
                (apart if held_out(f"{a} - {b}") else train).append((f"{a} - {b} =", str(a - b)))
    rng = random.Random(f"problems {seed}")
    for found in (train, apart):
        rng.shuffle(found)
    for stem, found in (("", train), ("_validation", apart)):
        rows = [
            {"messages": [_asked(p)], "check": {"kind": "maths", "answer": p[1]}} for p in found
        ]
        files.write_jsonl(folder / f"problems{stem}.jsonl", rows)
        shown = [{"messages": [_asked(p), {"role": "assistant", "content": p[1]}]} for p in found]
        files.write_jsonl(folder / f"sft{stem}.jsonl", shown)
    files.write_json(folder / "result.json", {"problems": len(train), "held_out": len(apart)})


def _asked(problem: Problem) -> dict[str, str]:
    return {"role": "user", "content": problem[0]}
