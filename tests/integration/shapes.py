"""A job with every shape that the pipelines use, each with a peculiarity that runners got wrong.

    python -m shapes --output DIR [--seconds S] [--fail] [Beam options]

Writes text files whose bytes do not depend on the runner. `--seconds` is what each of its slow
steps takes in all, to be killed in between; `--fail` raises a UserError in a worker.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from data_beam import runners
from internlm2_jax.errors import UserError

beam = runners.beam
SEEDS = 8
NUMBERS = 40_000
BIG = 2_000_000  # bytes of the largest values


class Split(beam.DoFn):
    """number -> (number mod 7, text); tagged: every third, and one big value per seed."""

    def __init__(self, seconds: float, fail: bool):
        super().__init__()
        self.seconds, self.fail = seconds, fail

    def process(self, seed):
        for number in range(seed, NUMBERS, SEEDS):
            if self.fail and number == 1001:
                raise UserError("number 1001 is refused; leave it out")
            yield number % 7, str(number)
            if number % 3 == 0:
                yield beam.pvalue.TaggedOutput("three", (number % 7, number * number))
        yield beam.pvalue.TaggedOutput("big", (f"seed{seed}", bytes([65 + seed]) * BIG))
        time.sleep(self.seconds / SEEDS)


class Join(beam.DoFn):
    """Takes each side of a group in one pass: on Flink they can be read only once."""

    def process(self, element, total, table, every):
        key, sides = element
        numbers = squares = 0
        for number in sides["numbers"]:
            numbers += int(number)
        for square in sides["squares"]:
            squares += square
        yield "joined", f"{key} {numbers} {squares} {total} {table[key]} {sum(every)}"


class Write(beam.DoFn):
    def __init__(self, folder: str, seconds: float):
        super().__init__()
        self.folder, self.seconds = folder, seconds

    def process(self, element):
        name, lines = element
        rows = sorted(lines)
        time.sleep(self.seconds / 4)
        partial = Path(self.folder, f"{name}.{os.getpid()}.partial")
        partial.write_text("\n".join(rows) + "\n")
        partial.replace(Path(self.folder, f"{name}.txt"))


def hot_line(element):
    """A group of one key with all the numbers."""
    _, values = element
    count = total = 0
    for value in values:
        count, total = count + 1, total + int(value)
    return "hot", f"{count} {total}"


def big_line(element):
    name, values = element
    return "big", " ".join([name, *(f"{value[:1].decode()}*{len(value)}" for value in values)])


def build(pipeline, folder: str, seconds: float, fail: bool) -> None:
    kv = beam.typehints.KV
    split = (
        pipeline
        | "Seeds" >> beam.Create(range(SEEDS))
        | "Spread" >> beam.Reshuffle()
        | "Split" >> beam.ParDo(Split(seconds, fail)).with_outputs("three", "big", main="numbers")
    )
    numbers = split.numbers | "Numbers" >> beam.Map(lambda x: x).with_output_types(kv[int, str])
    squares = split.three | "Squares" >> beam.Map(lambda x: x).with_output_types(kv[int, int])
    big = split.big | "Big" >> beam.Map(lambda x: x).with_output_types(kv[str, bytes])
    total = squares | "Values" >> beam.Values() | "Total" >> beam.CombineGlobally(sum)
    table = squares | "Table" >> beam.combiners.Count.PerKey()
    every = numbers | "Keys" >> beam.Keys() | "Distinct" >> beam.Distinct()
    joined = (
        {"numbers": numbers, "squares": squares}
        | "CoGroup" >> beam.CoGroupByKey()
        | "Join"
        >> beam.ParDo(
            Join(),
            beam.pvalue.AsSingleton(total),
            beam.pvalue.AsDict(table),
            beam.pvalue.AsIter(every),
        )
    )
    # One input both grouped and flattened (apache/beam#34647).
    sums = (
        numbers
        | "Group" >> beam.GroupByKey()
        | "Sum" >> beam.MapTuple(lambda key, some: ("sums", f"{key} {sum(map(int, some))}"))
    )
    ungrouped = numbers | "Few" >> beam.Filter(lambda kv: int(kv[1]) < 50)
    few = ungrouped | "FewLines" >> beam.MapTuple(lambda key, number: ("few", f"{key} {number}"))
    hot = (
        numbers
        | "OneKey" >> beam.MapTuple(lambda key, number: (b"hot", number)).with_output_types(
            kv[bytes, str])
        | "GroupHot" >> beam.GroupByKey()
        | "HotLine" >> beam.Map(hot_line)
    )  # fmt: skip
    large = big | "GroupBig" >> beam.GroupByKey() | "BigLine" >> beam.Map(big_line)
    (
        (joined, sums, few, hot, large)
        | "Lines" >> beam.Flatten()
        | "TypeLines" >> beam.Map(lambda x: x).with_output_types(kv[str, str])
        | "GroupLines" >> beam.GroupByKey()
        | "Write" >> beam.ParDo(Write(folder, seconds))
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--fail", action="store_true")
    known, beam_options = parser.parse_known_args()
    folder = Path(known.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        pipeline = runners.pipeline(beam_options)
        build(pipeline, str(folder), known.seconds, known.fail)
        runners.run(pipeline)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    import shapes  # DoFns of __main__ are pickled by value and cannot be imported by workers

    shapes.main()
