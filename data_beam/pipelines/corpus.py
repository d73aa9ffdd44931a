"""Raw files -> a filtered, de-duplicated corpus, split into train and validation.

The stages follow section 3.1.1 of the InternLM2 report: format, clean, de-duplicate (MinHash LSH,
word 5-grams, 128 hashes, threshold 0.7, newest kept). One Beam job does it in one pass over the
files; only fingerprints and one join by document id are shuffled:

    files -> read -> normalize -> filter -+-> fingerprints -> exact, near -> verdicts -+
                                          +-> documents -------------------------------+-> split
                                                                                       -> shards
The output folder appears whole, or not at all; equal files, seed and settings give equal bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from data_beam import progress, runners  # runners first: it imports Beam without its noise
from data_beam.io import corpus_folder, harvest, listing, readers, writers
from data_beam.kernels.textstats import Signals
from data_beam.pipelines import funnel as funnels
from data_beam.schema import Document, Drop, hash63
from data_beam.transforms import dedup, filters, tally
from data_beam.transforms.normalize import normalize
from internlm2_jax.errors import UserError
from internlm2_jax.files import atomic_write, fingerprint, whole_folder, write_json

beam = runners.beam
# Enough text for a small model, little enough for a minute on two cores.
MACHINE_BYTES = 28_000_000
_SAMPLES = 3  # per source and outcome


def run(
    output: str | Path,
    *,
    corpus: str | Path | None = None,
    seed: int = 0,
    max_bytes: int | None = MACHINE_BYTES,
    min_bytes: int = 20_000_000,
    ngram: int = 5,
    num_perm: int = 128,
    bands: int = 16,
    rows: int = 8,
    threshold: float = 0.7,
    validation_fraction: float = 0.02,
    shards: int = 2,
    limits: Mapping[str, Sequence[filters.Limit]] = filters.DEFAULT,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds the corpus in the folder `output` and returns its funnel (also in `funnel.json`).

    Reads every text and code file below `corpus`, or, when that is None, what the machine holds
    (`io.harvest`). At most about `max_bytes` of text are read, half of it code if possible (None =
    everything); a machine with less than `min_bytes` is a UserError. `validation_fraction` of each
    source's documents, at least one when there are two, go to the validation split. `limits` are
    the filters per source; `beam_options` are Beam command-line options.
    """
    output = Path(output)
    near = dedup.NearDuplicates(ngram, num_perm, bands, rows, threshold)
    if not 0 < validation_fraction < 1:
        raise UserError(
            f"validation_fraction {validation_fraction} is not between 0 and 1; try 0.02"
        )
    if shards < 1 or (max_bytes is not None and max_bytes < 1):
        raise UserError("shards and max_bytes must be at least 1")
    corpus_folder.check_output(output, "corpus", corpus)

    partial = output.with_name(output.name + ".partial")
    if corpus is not None:
        listed = listing.list_folder(Path(corpus), exclude=(output, partial))
        files = listing.select(listed, max_bytes, seed)
    else:
        listed = harvest.list_machine()
        files = harvest.select_machine(listed, max_bytes or 1 << 62, seed)
        if (found := sum(file.size for file in listed)) < min_bytes:
            raise UserError(
                f"this machine holds only {found / 1e6:.1f} MB of readable text and code, "
                f"{min_bytes / 1e6:.0f} MB are needed; give a folder with --corpus DIR"
            )
    settings = {
        "seed": seed, "max_bytes": max_bytes, "near_duplicates": near.__dict__,
        "validation_fraction": validation_fraction, "shards": shards,
        "limits": {name: [limit.__dict__ for limit in some] for name, some in limits.items()},
        "input": fingerprint([(file.root, file.path, file.size, file.kind) for file in files]),
    }  # fmt: skip

    with whole_folder(output) as folder:
        pipeline = runners.pipeline(beam_options)
        _build(pipeline, files, folder, near, limits, seed, validation_fraction, shards)
        with progress.show("corpus", total=len(files), unit="file"):
            runners.run(pipeline)
        funnel = funnels.finish(folder, listed, files, corpus)
        manifest = {
            "kind": "corpus",
            "settings": settings,
            "fingerprint": fingerprint(settings),
            "shards": funnels.shard_rows(folder, shards),
        }
        shutil.rmtree(folder / funnels.PARTS)
        write_json(folder / "manifest.json", manifest)
    return funnel


# --- the job ----------------------------------------------------------------------------------


def _sample(name: str, document: Document, seed: int, drop: Drop | None = None) -> Any:
    """A tagged candidate for samples.json."""
    row = {"id": document.id, "source": document.source, "path": document.path,
           "bytes": document.num_bytes, "text": document.text[:funnels.EXCERPT]}  # fmt: skip
    if drop is not None:
        row |= {"stage": drop.stage, "reason": drop.reason, "value": drop.value,
                "of_id": drop.of_id}  # fmt: skip
    order = hash63(document.id, seed, "sample")
    return beam.pvalue.TaggedOutput("samples", (name, (order, orjson.dumps(row))))


def _sample_lines(group: tuple[str, Sequence[tuple[int, bytes]]]) -> Iterator[tuple[str, bytes]]:
    name, chosen = group
    for order, row in chosen:
        yield f"{funnels.PARTS}/samples.jsonl", orjson.dumps([name, order, orjson.loads(row)])


class _Read(beam.DoFn):
    """FileRef -> encoded documents."""

    def process(self, element):
        file = listing.FileRef(*element)
        seen = 0
        for item in readers.read(file):
            size = item.num_bytes if isinstance(item, Document) else 0
            source = item.source if isinstance(item, Document) else file.source
            seen += size
            yield tally.count("read", source, "in", size)
            if isinstance(item, Document):
                yield tally.count("read", source, "out", size)
                encoding = item.meta.get("encoding", "utf-8")
                yield tally.count("encoding", source, "out", size, encoding)
                yield item.to_bytes()
            else:
                yield tally.count("read", source, "drop", size, item.reason)
                yield beam.pvalue.TaggedOutput("drops", (item.id, item.to_bytes()))
        progress.bump(num_bytes=seen)


class _Examine(beam.DoFn):
    """Encoded document -> (id, encoded normalised document) and its fingerprint, if it passes."""

    def __init__(self, near: dedup.NearDuplicates, limits, seed: int):
        super().__init__()
        self.near, self.limits, self.seed = near, limits, seed

    def process(self, element):
        raw = Document.from_bytes(element)
        document = raw._replace(text=normalize(raw.text))
        source, size = document.source, document.num_bytes
        yield tally.count("normalize", source, "in", raw.num_bytes)
        if not document.text:
            yield from self._drop(document, Drop(raw.id, "normalize", "empty"), raw.num_bytes)
            return
        yield tally.count("normalize", source, "out", size)
        yield tally.count("filter", source, "in", size)
        signals = Signals(document.text)
        broken = filters.first_broken(signals, filters.limits_for(source, self.limits))
        if broken is not None:
            drop = Drop(document.id, "filter", broken[0], round(broken[1], 4))
            yield from self._drop(document, drop, size)
            return
        yield tally.count("filter", source, "out", size)
        yield beam.pvalue.TaggedOutput(
            "fingerprints", dedup.fingerprint(document, signals.words, self.near, self.seed)
        )
        yield document.id, document.to_bytes()

    def _drop(self, document: Document, drop: Drop, size: int):
        yield tally.count(drop.stage, document.source, "drop", size, drop.reason)
        yield beam.pvalue.TaggedOutput("drops", (drop.id, drop.to_bytes()))
        yield _sample(f"dropped {drop.reason}", document, self.seed, drop)


class _Judge(beam.DoFn):
    """Joins documents with the verdicts of de-duplication."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def process(self, element):
        _, found = element
        verdicts = [Drop.from_bytes(verdict) for verdict in found["verdicts"]]
        drop = verdicts[0] if verdicts else None
        for record in found["documents"]:
            document = Document.from_bytes(record)
            source, size = document.source, document.num_bytes
            for stage in ("exact_dedup", "near_dedup"):
                yield tally.count(stage, source, "in", size)
                if drop is not None and drop.stage == stage:
                    yield tally.count(stage, source, "drop", size, drop.reason)
                    yield _sample(f"dropped {drop.reason}", document, self.seed, drop)
                    return
                yield tally.count(stage, source, "out", size)
            yield _sample(f"kept {source}", document, self.seed)
            yield source, record


class _Extremes(beam.CombineFn):
    """Smallest and largest of some numbers."""

    def create_accumulator(self):
        return None

    def add_input(self, total, item):
        return (item, item) if total is None else (min(total[0], item), max(total[1], item))

    def merge_accumulators(self, totals):
        some = [total for total in totals if total is not None]
        return (min(t[0] for t in some), max(t[1] for t in some)) if some else None

    def extract_output(self, total):
        return total


def split_of(number: int, extremes: tuple[int, int], fraction: float) -> str:
    """The split of a document with the 63-bit hash `number`: validation below `fraction` of the
    range. Of two or more documents of a source the one with the smallest hash always validates,
    the one with the largest always trains."""
    if number == extremes[1]:
        return "train"
    return "validation" if number == extremes[0] or number < fraction * 2**63 else "train"


class _Assign(beam.DoFn):
    """(source, record) -> (name of the shard, (id, record))."""

    def __init__(self, seed: int, fraction: float, shards: int):
        super().__init__()
        self.seed, self.fraction, self.shards = seed, fraction, shards

    def process(self, element, extremes):
        source, record = element
        document = Document.from_bytes(record)
        number = hash63(document.id, self.seed, "split")
        split = split_of(number, extremes[source], self.fraction)
        shards = self.shards if split == "train" else 1
        name = writers.shard_name(split, source, int(document.id, 16) % shards, shards)
        yield tally.count("split", source, "in", document.num_bytes)
        yield tally.count("split", source, "out", document.num_bytes)
        yield tally.count(split, source, "out", document.num_bytes)
        yield name, (document.id, record)


class _WriteShard(beam.DoFn):
    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def process(self, element):
        name, group = element
        records = [record for _, record in sorted(group)]
        path = Path(self.folder, name)
        writers.write_array_record(path, records, writers.DOCUMENTS_OPTIONS)
        yield orjson.dumps({"name": name, "documents": len(records)})


class _WriteLines(beam.DoFn):
    """(file name, lines) -> the file, lines sorted; .zst names are compressed."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def process(self, element):
        name, lines = element
        path = Path(self.folder, name)
        if name.endswith(".zst"):
            writers.write_lines_zst(path, sorted(lines))
        else:
            atomic_write(path, b"\n".join(sorted(lines)) + b"\n")


def _build(pipeline, files, folder: Path, near, limits, seed, fraction, shards) -> None:
    """Adds the whole job to `pipeline`."""
    keyed_bytes = beam.typehints.KV[str, bytes]
    read = (
        pipeline
        | "Files" >> beam.Create([tuple(file) for file in files])
        | "SpreadFiles" >> beam.Reshuffle()
        | "Read" >> beam.ParDo(_Read()).with_outputs("drops", tally.TAG, main="documents")
    )
    examined = read.documents | "Examine" >> beam.ParDo(
        _Examine(near, dict(limits), seed)
    ).with_outputs("drops", "fingerprints", "samples", tally.TAG, main="documents")
    verdicts = examined.fingerprints | "Deduplicate" >> dedup.Deduplicate(near)
    typed = {
        "documents": examined.documents
        | "TypeDocuments" >> beam.Map(lambda kv: kv).with_output_types(keyed_bytes),
        "verdicts": verdicts
        | "TypeVerdicts" >> beam.Map(lambda kv: kv).with_output_types(keyed_bytes),
    }
    judged = (
        typed
        | "Join" >> beam.CoGroupByKey()
        | "Judge" >> beam.ParDo(_Judge(seed)).with_outputs("samples", tally.TAG, main="kept")
    )
    extremes = (
        judged.kept
        | "SplitHash" >> beam.Map(
            lambda kept: (kept[0], hash63(Document.from_bytes(kept[1]).id, seed, "split"))
        ).with_output_types(beam.typehints.KV[str, int])
        | "Extremes" >> beam.CombinePerKey(_Extremes())
    )  # fmt: skip
    assigned = judged.kept | "Assign" >> beam.ParDo(
        _Assign(seed, fraction, shards), beam.pvalue.AsDict(extremes)
    ).with_outputs(tally.TAG, main="shards")
    written = (
        assigned.shards
        | "TypeShards" >> beam.Map(lambda kv: kv).with_output_types(beam.typehints.KV[str, tuple])
        | "GroupShards" >> beam.GroupByKey()
        | "WriteShards" >> beam.ParDo(_WriteShard(str(folder)))
    )
    tallies = (
        [read[tally.TAG], examined[tally.TAG], judged[tally.TAG], assigned[tally.TAG]]
        | "Tallies" >> beam.Flatten()
        | "Count" >> beam.CombinePerKey(tally.Sum())
    )
    samples = (
        [examined.samples, judged.samples]
        | "Samples" >> beam.Flatten()
        | "FewSamples" >> beam.combiners.Top.SmallestPerKey(_SAMPLES)
    )
    lines = [
        [read.drops, examined.drops, verdicts]
        | "Drops" >> beam.Flatten()
        | "DropLines" >> beam.Map(lambda drop: ("drops.jsonl.zst", drop[1])),
        tallies
        | "TallyLines" >> beam.Map(lambda kv: (f"{funnels.PARTS}/tallies.jsonl", orjson.dumps(kv))),
        written | "ShardLines" >> beam.Map(lambda row: (f"{funnels.PARTS}/shards.jsonl", row)),
        samples
        | "SampleLines" >> beam.FlatMap(_sample_lines),
    ]  # fmt: skip
    (
        lines
        | "Lines" >> beam.Flatten()
        | "TypeLines" >> beam.Map(lambda kv: kv).with_output_types(keyed_bytes)
        | "GroupLines" >> beam.GroupByKey()
        | "WriteLines" >> beam.ParDo(_WriteLines(str(folder)))
    )
