"""Interpreter sessions: a notebook's questions one by one, the model's code in the sandbox.

What a step prints goes back to the model as the interpreter's turn. A session that dies costs its
own item's remaining steps and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from internlm2_jax.evals.items import Item
from internlm2_jax.evals.subject import Subject
from internlm2_jax.evals.suites import Suite
from internlm2_jax.evals.texts import rouge_l
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.rlhf.verifiers.code import program_of
from internlm2_jax.sandbox import Result, SandboxError, Session, require
from internlm2_jax.sandbox.pool import parallel

TOGETHER = 8  # sessions that are open at a time
SHOWN = 2000  # letters of output that the model sees
INTERPRETER = "You can run Python in a Jupyter notebook that keeps its state between calls."


class _Open:
    """One item's conversation and its interpreter."""

    def __init__(self, item: Item) -> None:
        self.item, self.steps = item, list(item.check["steps"])
        self.turns: list[dict[str, Any]] = [
            {"role": "system", "name": "interpreter", "content": INTERPRETER}
        ]
        self.records: list[dict[str, Any]] = []
        self.session: Session | None = None
        self.cut, self.lost = False, False


def results(
    subject: Subject, suite: Suite, items: Sequence[Item], seed: int
) -> Iterator[dict[str, Any]]:
    """A record an item: its steps with code, output and marks; `score` is the mean over the steps.

    parts: {"executable", "numeric", "general", "text": marks of the steps of that kind}.
    """
    require()
    for start in range(0, len(items), TOGETHER):
        opened = [_Open(item) for item in items[start : start + TOGETHER]]
        try:
            for step in range(max(len(o.steps) for o in opened)):
                _step(subject, suite, [o for o in opened if step < len(o.steps)], step, seed)
        finally:
            for o in opened:
                if o.session:
                    o.session.close()
        yield from map(_record, opened)


def _step(subject: Subject, suite: Suite, opened: Sequence[_Open], step: int, seed: int) -> None:
    prompts = []
    for o in opened:
        o.turns.append({"role": "user", "content": o.steps[step]["question"]})
        ids, cut = subject.cut(subject.encode_chat(o.turns), suite.max_new_tokens, "middle")
        o.cut |= cut
        prompts.append(ids)
    said = dict(
        subject.answers(
            prompts,
            max_new_tokens=suite.max_new_tokens,
            sampling=Sampling(suite.temperature, top_p=suite.top_p),
            seeds=[(seed, step)] * len(prompts),
        )
    )
    codes = [code_of(said[n].tokens, subject.tokenizer) for n in range(len(opened))]
    timeout = float(suite.options.get("timeout", 30))
    ran = parallel(lambda pair: _run(*pair, timeout), list(zip(opened, codes, strict=True)))
    for n, (o, code, result) in enumerate(zip(opened, codes, ran, strict=True)):
        asked, output = o.steps[step], shown(result) if result else ""
        turn: dict[str, Any] = {"role": "assistant", "content": "" if code else said[n].text}
        o.turns.append(turn)
        if code:
            turn["tool_call"] = {"tool": "interpreter", "content": f"```python\n{code}\n```"}
            o.turns.append(
                {"role": "environment", "name": "interpreter", "content": output[:SHOWN]}
            )
        o.lost |= bool(result and result.status == "infrastructure")
        o.records.append(
            {
                "question": asked["question"], "kind": asked["kind"], "expected": asked["output"],
                "text": said[n].text, "code": code, "output": output[:SHOWN],
                "status": result.status if result else "no code", "marks": graded(asked, result),
            }
        )  # fmt: skip


def code_of(tokens: Sequence[int], tokenizer: Any) -> str:
    """The code of an interpreter call, or of a fenced block; "" where there is neither."""
    from internlm2_jax.data import chat

    answer = chat.parse_response(tokens, tokenizer)
    if answer.tool_call and answer.tool_call["tool"] == "interpreter":
        return program_of(answer.tool_call["content"]).strip("\n")
    return program_of(answer.content).strip("\n") if "```" in answer.content else ""


def _run(o: _Open, code: str, timeout: float) -> Result | None:
    """None where there is no code. A session that has ended is begun again, without its state."""
    if not code:
        return None
    try:
        if o.session is None or not o.session.alive:
            o.session = Session()
        return o.session.run(code, timeout=timeout)
    except (SandboxError, OSError) as error:
        return Result("infrastructure", "", 0.0, error=str(error))


def shown(result: Result) -> str:
    """What a notebook would show: output, the last value, or the error's last line."""
    if result.status != "ok":
        lines = result.error.strip().splitlines()
        return result.output + (lines[-1] if lines else result.status)
    return result.output + (result.shown or "")


def graded(step: dict[str, Any], result: Result | None) -> dict[str, float]:
    """Marks of a step: it ran; and what it shows is what the notebook has, for steps that are
    compared ("num", "general": equal, or a part of it; "text": ROUGE-L)."""
    ran = bool(result and result.status == "ok")
    marks = {"executable": float(ran)}
    if step["kind"] not in ("num", "general", "text"):
        return marks
    name = {"num": "numeric"}.get(step["kind"], step["kind"])
    said = shown(result).strip() if result and ran else ""
    if step["kind"] == "text":
        marks[name] = rouge_l(said, step["output"])
    else:
        right = step["output"].strip()
        marks[name] = float(bool(said) and (said == right or _whole(said, right)))
    return marks


def _whole(said: str, right: str) -> bool:
    """Whether `said` stands in `right` as words of its own: 1 does not stand in 12."""
    return re.search(rf"(?<![\w.]){re.escape(said)}(?![\w.])", right) is not None


def _record(o: _Open) -> dict[str, Any]:
    parts: dict[str, list[float]] = {}
    for record in o.records:
        for name, mark in record["marks"].items():
            parts.setdefault(name, []).append(mark)
    # a step that is compared counts by its comparison, any other by whether it ran
    last = [list(record["marks"].values())[-1] for record in o.records]
    return {
        "id": o.item.id, "group": o.item.group, "where": o.item.where,
        "prompt": "", "question": o.steps[0]["question"], "answers": [], "cut": o.cut,
        "steps": o.records, "parts": parts, "score": None if o.lost else sum(last) / len(last),
    }  # fmt: skip
