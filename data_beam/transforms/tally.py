"""Counts of documents and bytes at every stage, carried as data through the job.

Beam's own counters may count a retried bundle twice and differ between runners; these are summed
from the elements themselves, so the funnel is exact and the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from data_beam.runners import beam

# (stage, source, event, reason): event is "in", "out" or "drop"; reason is "" unless dropped.
Key = tuple[str, str, str, str]
Count = tuple[int, int]  # documents, bytes
TAG = "tally"


def count(stage: str, source: str, event: str, num_bytes: int, reason: str = "") -> Any:
    """A tagged output element that counts one document."""
    return beam.pvalue.TaggedOutput(TAG, ((stage, source, event, reason), (1, num_bytes)))


class Sum(beam.CombineFn):
    """Adds pairs (documents, bytes)."""

    def create_accumulator(self) -> Count:
        return 0, 0

    def add_input(self, total: Count, item: Count) -> Count:
        return total[0] + item[0], total[1] + item[1]

    def merge_accumulators(self, totals: Iterable[Count]) -> Count:
        documents = num_bytes = 0
        for one in totals:
            documents += one[0]
            num_bytes += one[1]
        return documents, num_bytes

    def extract_output(self, total: Count) -> Count:
        return total


def stage_row(stage: str, totals: Mapping[Key, Count], source: str | None = None) -> dict:
    """One row of the funnel, over all sources or one."""
    row: dict[str, Any] = {"stage": stage, "documents_in": 0, "documents_out": 0, "bytes_in": 0,
                           "bytes_out": 0, "dropped": {}}  # fmt: skip
    for (name, of, event, reason), (documents, num_bytes) in sorted(totals.items()):
        if name != stage or (source is not None and of != source):
            continue
        if event == "drop":
            dropped = row["dropped"].setdefault(reason, {"documents": 0, "bytes": 0})
            dropped["documents"] += documents
            dropped["bytes"] += num_bytes
        else:
            row[f"documents_{event}"] += documents
            row[f"bytes_{event}"] += num_bytes
    return row
