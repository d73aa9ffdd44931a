"""One door to all verifiers: a row says how its response is to be checked.

{"check": {"kind": "exact", "answer": "12"}}
{"check": {"kind": "maths", "answer": "\\\\frac{1}{2}"}}
{"check": {"kind": "code", "calls": [["f", [1], 2]], "timeout": 5}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.verifiers.code import Code, Problem
from internlm2_jax.rlhf.verifiers.maths import Accept, Maths, needs_math_verify
from internlm2_jax.rlhf.verifiers.verdict import Verdict, failed, passed
from internlm2_jax.sandbox import require

KINDS = ("exact", "maths", "code")


class Checks:
    """Verdicts of responses to rows of any kind; processes begin when first needed.

    workers: of each kind (default: processor cores).
    maths_timeout: seconds of one comparison; maths_accept: see `Maths`.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        maths_timeout: float = 5.0,
        maths_accept: Accept = "either",
    ) -> None:
        self._workers, self._timeout, self._accept = workers, maths_timeout, maths_accept
        self._code = Code(workers=workers)
        self._maths: Maths | None = None

    def __call__(self, rows: Sequence[Mapping], responses: Sequence[str]) -> list[Verdict]:
        """Errors: UserError where a row cannot be checked, or this machine cannot isolate."""
        verdicts: dict[int, Verdict] = {}
        by_kind: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for i, row in enumerate(rows):
            by_kind[row["check"]["kind"]].append(i)
        work: dict[str, Callable[[list[str], list[Mapping]], list[Verdict]]] = {
            "exact": _exact,
            "maths": lambda said, checks: self._of_maths(said, [c["answer"] for c in checks]),
            "code": lambda said, checks: self._code(said, [_problem(c) for c in checks]),
        }
        for kind, chosen in by_kind.items():
            if chosen:
                said = [responses[i] for i in chosen]
                found = work[kind](said, [rows[i]["check"] for i in chosen])
                verdicts.update(zip(chosen, found, strict=True))
        return [verdicts[i] for i in range(len(rows))]

    def validate(self, rows: Sequence[Mapping], name: str) -> None:
        """Errors: UserError that names the first row that cannot be checked, or what is missing on
        this machine; nothing has run then."""
        for number, row in enumerate(rows, start=1):
            try:
                _validate(row.get("check"))
            except UserError as error:
                raise UserError(f"{name}:{number}: {error}") from error
        kinds = {row["check"]["kind"] for row in rows}
        if "code" in kinds:
            require()
        if "maths" in kinds and self._accept == "either":
            needs_math_verify()

    def close(self) -> None:
        if self._maths:
            self._maths.close()
            self._maths = None

    def _of_maths(self, responses: list[str], golds: list[str]) -> list[Verdict]:
        if self._maths is None:
            self._maths = Maths(workers=self._workers, timeout=self._timeout, accept=self._accept)
        return self._maths(responses, golds)

    def __enter__(self) -> Checks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _validate(check: Any) -> None:
    if not isinstance(check, Mapping) or check.get("kind") not in KINDS:
        raise UserError(
            f'no check of a known kind; it has a "check": {{"kind": ...}} of {", ".join(KINDS)}'
        )
    if check["kind"] == "code":
        _problem(check)
    elif not isinstance(check.get("answer"), str):
        raise UserError('its check has no "answer" that is a text')


def _problem(check: Mapping[str, Any]) -> Problem:
    return Problem.of({k: v for k, v in check.items() if k != "kind"})


def _exact(responses: Sequence[str], checks: Sequence[Mapping]) -> list[Verdict]:
    return [
        passed() if said.strip() == check["answer"] else failed(f"not {check['answer']!r:.60}")
        for said, check in zip(responses, checks, strict=True)
    ]


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares of a batch: {"pass_rate", "timeouts", "infrastructure_errors", "disputed"}.

    The pass rate is of those that could be judged.
    """
    judged = [v for v in verdicts if v.outcome != "infrastructure"]
    total = max(1, len(verdicts))
    return {
        "pass_rate": sum(v.outcome == "pass" for v in judged) / max(1, len(judged)),
        "timeouts": sum(v.outcome == "timeout" for v in verdicts) / total,
        "infrastructure_errors": (len(verdicts) - len(judged)) / total,
        "disputed": sum(v.disputed for v in verdicts) / total,
    }
