"""Arms of an ablation side by side: means over seeds with confidence intervals."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from internlm2_jax.evals.intervals import CONFIDENCE, Interval, student
from internlm2_jax.report import svg
from internlm2_jax.report.blocks import Block, Cell, Grid, Section, Table, num, percent, pretty
from internlm2_jax.report.intervals import interval_chart, said
from internlm2_jax.report.load import DONE, Run

STAGE = "measure"
SOURCE = f"*/{STAGE}/result.json"
_SHARES = ("dropped/", "task_accuracy")
# Of measures by source, those of everything are drawn.
_DRAWN = ("loss", "bits_per_byte", "bytes_per_token", "task_accuracy", "cache_bytes_per_token",
          "decode_tokens_per_second")  # fmt: skip


def by_arm(runs: Sequence[Run], stage: str) -> dict[str, list[Run]]:
    """Finished runs by the arm that their `stage` names, in the order given."""
    found: dict[str, list[Run]] = collections.defaultdict(list)
    for run in runs:
        if arm := run.result(stage).text("arm"):
            found[arm].append(run)
    return dict(found)


def seeds(found: dict[str, list[Run]]) -> str:
    """What intervals are of, for the note of a table or chart."""
    counts = "; ".join(f"{arm}: {len(members)}" for arm, members in found.items())
    return (
        f"Means over seeds ({counts}); brackets and bars are {CONFIDENCE:.0%} confidence "
        "intervals (Student's t)."
    )


def arms(runs: Sequence[Run]) -> Section:
    """Table and charts of what the stage `measure` found; empty when the runs have none."""
    found = by_arm(runs, STAGE)
    blocks: list[Block] = []
    if found:
        table = {key: _intervals(found, key) for key in _keys(found)}
        blocks.append(
            Table(
                title="What the arms come to",
                head=["Measure", *found],
                rows=[
                    [
                        Cell(key, mono=True),
                        *(_text(key, row[arm]) if arm in row else "" for arm in found),
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
        blocks.append(Grid([_chart(key, table[key]) for key in drawn]))
    return Section("arms", "Ablation", DONE, "", blocks)


def _keys(found: dict[str, list[Run]]) -> list[str]:
    runs = [run for members in found.values() for run in members]
    names = dict.fromkeys(name for run in runs for name in run.result(STAGE).numbers("measures"))
    return sorted(names, key=lambda name: (name.partition("/")[0] not in _DRAWN, name))


def _intervals(found: dict[str, list[Run]], key: str) -> dict[str, Interval]:
    values = {
        arm: [run.result(STAGE).numbers("measures").get(key) for run in members]
        for arm, members in found.items()
    }
    return {
        arm: student(known)
        for arm, numbers in values.items()
        if (known := [v for v in numbers if v is not None])
    }


def _text(key: str, interval: Interval) -> str:
    return said(interval, percent if key.startswith(_SHARES) else num)


def _chart(key: str, found: dict[str, Interval]) -> Block:
    write = percent if key.startswith(_SHARES) else num
    said = ", ".join(f"{arm} {_text(key, interval)}" for arm, interval in found.items())
    name = pretty(key.replace("/", ", "))
    return svg.picture(
        title=name,
        alt=f"{name}, mean and confidence interval of each arm: {said}.",
        source=SOURCE,
        draw=interval_chart(
            [(arm, i.mean, i.low, i.high, write(i.mean)) for arm, i in found.items()],
            name.lower(),
            shares=key.startswith(_SHARES),
            zero="absent",
        ),
        height=70 + 34 * len(found),
    )
