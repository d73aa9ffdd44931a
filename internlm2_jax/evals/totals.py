"""Totals of an evaluation, from its lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internlm2_jax.evals import statistics
from internlm2_jax.evals.suites import Suite


def totals(
    suite: Suite, results: Sequence[dict[str, Any]], *, model: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """One JSON object. Shares are from 0 to 1.

    score, interval: the mean over items that could be graded, with its 95% bootstrap interval.
    groups: the same of each group, and `macro`, the mean of the groups.
    pass_at_k, majority: where there are several samples.
    cut, unfinished, infrastructure, inconsistent: how many items had their prompt shortened, had an
      answer that met the length limit, could not be graded, or changed with the order of answers.
    """
    graded = [r for r in results if r["score"] is not None]
    found: dict[str, Any] = {
        "model": model,
        "suite": suite.name,
        "dimension": suite.dimension,
        "measure": suite.measure,
        "method": suite.method,
        "shots": suite.shots,
        "items": len(results),
        "graded": len(graded),
        "cut": sum(r["cut"] for r in results),
        "settings": settings,
    }
    outputs = [o for r in results for o in r.get("outputs", ())]
    if outputs:
        found["unfinished"] = sum(not o["finished"] for o in outputs)
        found["infrastructure"] = sum(o["outcome"] == "infrastructure" for o in outputs)
        found["timeouts"] = sum(o["outcome"] == "timeout" for o in outputs)
    if suite.measure == "judge":
        found["inconsistent"] = sum(not r["consistent"] for r in results)
    if not graded:
        return found | {"score": None, "interval": None}
    found |= _score([r["score"] for r in graded])
    groups: dict[str, list[float]] = {}
    for r in graded:
        groups.setdefault(r["group"], []).append(r["score"])
    if len(groups) > 1:
        found["groups"] = {
            name: {"score": sum(s) / len(s), "items": len(s)} for name, s in sorted(groups.items())
        }
        found["macro"] = sum(g["score"] for g in found["groups"].values()) / len(groups)
    if suite.samples > 1:
        found |= _samples(suite, graded)
    parts = [r["parts"] for r in graded if "parts" in r]
    if parts:
        names = dict.fromkeys(name for part in parts for name in part)
        found["parts"] = {
            name: sum(sum(p[name]) for p in parts if name in p)
            / max(1, sum(len(p[name]) for p in parts if name in p))
            for name in names
        }
    return found


def _score(scores: Sequence[float]) -> dict[str, Any]:
    return {"score": sum(scores) / len(scores), "interval": list(statistics.interval(scores))}


def _samples(suite: Suite, graded: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """pass@k over the items that have k graded samples; votes over all."""
    rates: dict[str, float | None] = {}
    marks = [[o for o in r["outputs"] if o["score"] is not None] for r in graded]
    for k in suite.k:
        known = [m for m in marks if len(m) >= k]
        passed = [statistics.pass_at_k(len(m), sum(o["score"] == 1 for o in m), k) for m in known]
        rates[str(k)] = sum(passed) / len(passed) if passed else None
    votes = [
        statistics.majority([o["answer"] for o in m], [o["score"] == 1 for o in m]) for m in marks
    ]
    return {"pass_at_k": rates, "majority": sum(votes) / len(votes)}
