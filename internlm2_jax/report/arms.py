"""Arms of an ablation side by side: means over seeds with confidence intervals."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence

from internlm2_jax.evals.intervals import CONFIDENCE, Interval, student
from internlm2_jax.report import svg
from internlm2_jax.report.blocks import Block, Cell, Grid, Section, Table, num, percent, pretty
from internlm2_jax.report.intervals import Zero, interval_chart, said
from internlm2_jax.report.load import DONE, Run

STAGE = "measure"
MEASURED_BY = (STAGE, "judge_policy", "needle")
SOURCE = f"*/{STAGE}/result.json"
_SHARES = ("dropped/", "task_accuracy")
# Of measures by source, those of everything are drawn.
_DRAWN = ("loss", "bits_per_byte", "bytes_per_token", "task_accuracy", "task_answer_loss",
          "cache_bytes_per_token", "decode_tokens_per_second")  # fmt: skip


def by_arm(runs: Sequence[Run], stage: str) -> dict[str, list[Run]]:
    """Finished runs by the arm that their `stage` names, in the order given."""
    found: dict[str, list[Run]] = collections.defaultdict(list)
    for run in runs:
        if arm := run.result(stage).text("arm"):
            found[arm].append(run)
    return dict(found)


def arm_of(run: Run) -> str:
    """Which arm of an ablation a run is; "" when it is none, or not measured yet."""
    return next((arm for stage in MEASURED_BY if (arm := run.result(stage).text("arm"))), "")


def seeds(found: dict[str, list[Run]]) -> str:
    """What intervals are of, for the note of a table or chart."""
    counts = "; ".join(f"{arm}: {len(members)}" for arm, members in found.items())
    return (
        f"Means over seeds ({counts}); brackets and bars are {CONFIDENCE:.0%} confidence "
        "intervals (Student's t)."
    )


def intervals(
    found: dict[str, list[Run]], value: Callable[[Run], float | None], share: bool
) -> dict[str, Interval]:
    """Mean over the runs of every arm that has values; a share's interval stays within 0..1."""
    bounds = (0.0, 1.0) if share else (-math.inf, math.inf)
    values = {arm: [value(run) for run in members] for arm, members in found.items()}
    return {
        arm: student(known, *bounds)
        for arm, numbers in values.items()
        if (known := [v for v in numbers if v is not None])
    }


def written(interval: Interval, share: bool) -> str:
    """A mean with its interval, in per cent if it is a share."""
    return said(interval, _write(share))


def means_chart(
    name: str, found: dict[str, Interval], share: bool, *, axis: str, source: str, zero: Zero
) -> Block:
    """A row for every arm; `axis` names its values, `zero` is of interval_chart."""
    ends = ", ".join(f"{arm} {written(interval, share)}" for arm, interval in found.items())
    return svg.picture(
        title=name,
        alt=f"{name}, mean and confidence interval of each arm: {ends}.",
        source=source,
        draw=interval_chart(
            [(arm, i.mean, i.low, i.high, _write(share)(i.mean)) for arm, i in found.items()],
            axis,
            shares=share,
            zero=zero,
        ),
        height=70 + 34 * len(found),
    )


def arms(runs: Sequence[Run]) -> Section:
    """Table and charts of what the stage `measure` found; empty when the runs have none."""
    found = by_arm(runs, STAGE)
    blocks: list[Block] = []
    if found:
        table = {
            key: intervals(found, functools.partial(_measured, key=key), _is_share(key))
            for key in _keys(found)
        }
        blocks.append(
            Table(
                title="What the arms come to",
                head=["Measure", *found],
                rows=[
                    [
                        Cell(key, mono=True),
                        *(written(row[arm], _is_share(key)) if arm in row else "" for arm in found),
                    ]
                    for key, row in table.items()
                ],
                source=SOURCE,
                numeric=frozenset(range(1, len(found) + 1)),
                note=seeds(found),
            )
        )
        drawn = [
            key for key, row in table.items()
            if key.partition("/")[0] in _DRAWN and len({i.mean for i in row.values()}) > 1
        ]  # fmt: skip
        names = {key: pretty(key.replace("/", ", ")) for key in drawn}
        blocks.append(
            Grid(
                [
                    means_chart(
                        name,
                        table[key],
                        _is_share(key),
                        axis=name.lower(),
                        source=SOURCE,
                        zero="absent",
                    )
                    for key, name in names.items()
                ]
            )
        )
    return Section("arms", "Ablation", DONE, "", blocks)


def _keys(found: dict[str, list[Run]]) -> list[str]:
    runs = [run for members in found.values() for run in members]
    names = dict.fromkeys(name for run in runs for name in run.result(STAGE).numbers("measures"))
    return sorted(names, key=lambda name: (name.partition("/")[0] not in _DRAWN, name))


def _write(share: bool) -> Callable[[float], str]:
    return percent if share else num


def _measured(run: Run, key: str) -> float | None:
    return run.result(STAGE).numbers("measures").get(key)


def _is_share(key: str) -> bool:
    return key.startswith(_SHARES)
