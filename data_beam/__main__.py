"""Command line: `python -m data_beam PIPELINE --input GLOB --output DIR [any Beam option]`."""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from internlm2_jax.errors import UserError

Result = TypeVar("Result")
# What is not an option of ours goes to Beam: --runner, --direct_num_workers, --flink_master ...
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Beam jobs: raw files to a corpus, a corpus to tokens. Options that a command does not list go
    to Beam. The same command again continues where it stopped."""


def _options(*options: Callable) -> Callable:
    def add(function: Callable) -> Callable:
        return functools.reduce(lambda f, option: option(f), reversed(options), function)

    return add


_OUTPUT = click.option("--output", required=True, metavar="DIR", help="Folder to write to.")
_SEED = click.option("--seed", default=0, show_default=True)
_VALIDATION = click.option("--validation-fraction", default=0.02, show_default=True)
_READING = _options(
    click.option("--input", "inputs", required=True, multiple=True, metavar="GLOB",
                 help="Files, folders or patterns (** crosses folders); may be repeated."),
    _OUTPUT,
    click.option("--source", metavar="NAME", help="What to call documents that do not say."),
    click.option("--text-field", metavar="NAME", help="Field of JSON and Parquet records.  "
                 "[default: text, else content]"),
    click.option("--require-id", is_flag=True, help="Records without an id are dead letters."),
    click.option("--dump", default="", metavar="NAME",
                 help="Crawl that web pages are from.  [default: by path or archive]"),
    click.option("--exclude", multiple=True, metavar="PATH",
                 help="Folder or file to leave out; may be repeated."),
    click.option("--extraction-timeout", default=20.0, show_default=True,
                 help="CPU seconds that one web page may take."),
    click.option("--shards", type=int, metavar="N",
                 help="Shards of the documents.  [default: one per 128 MB]"),
    click.option("--wave-bytes", type=int, metavar="N",
                 help="Input read at a time by the local runner.  [default: 256 MB]"),
    click.option("--max-dead-share", default=0.25, show_default=True,
                 help="Fail when more of the records cannot be read."),
    click.option("--max-removed-share", default=0.95, show_default=True,
                 help="Fail when a source loses more of its documents."),
    _SEED,
    _VALIDATION,
)  # fmt: skip
_NEAR = _options(
    click.option("--threshold", default=0.7, show_default=True,
                 help="Jaccard similarity from which two documents count as copies."),
    click.option("--ngram", default=5, show_default=True, help="Words per shingle."),
    click.option("--num-perm", default=128, show_default=True, help="Hashes per signature."),
    click.option("--bands", default=16, show_default=True,
                 help="Parts of a signature of which copies share one; 20 x 6 finds more of the "
                 "copies just above the threshold."),
    click.option("--rows", default=8, show_default=True, help="Hashes per band."),
)  # fmt: skip
_NEAR_GUARDS = _options(
    click.option("--verify", type=click.Choice(["signature", "exact", "none"]),
                 default="signature", show_default=True,
                 help="How candidates are checked: by estimate, by their texts, or not."),
    click.option("--max-cluster", default=100_000, show_default=True,
                 help="Fail when more different texts are copies of one another."),
)  # fmt: skip
_NEAR_NAMES = ("threshold", "ngram", "num_perm", "bands", "rows", "verify", "max_cluster")


@main.command(context_settings=_PASS_ON)
@click.option(
    "--input",
    "corpus",
    metavar="DIR",
    help="Folder with text and code files. Without it: what this machine holds.",
)
@_OUTPUT
@_SEED
@click.option(
    "--max-bytes",
    type=int,
    metavar="N",
    help="Read about N bytes at most. Default: all of --input, 28 MB of a machine.",
)
@_NEAR
@_VALIDATION
@click.option("--shards", default=2, show_default=True, help="Shards of the documents.")
@click.pass_context
def corpus(
    context: click.Context, corpus: str | None, output: str, max_bytes: int | None, **options: Any
):
    """Text and code of a folder, or of this machine: the demo's corpus."""
    from data_beam.io import corpus_folder
    from data_beam.pipelines import corpus as job

    def start() -> dict[str, Any]:
        corpus_folder.check_work_folder(output, [corpus] if corpus else [])
        limit = job.MACHINE_BYTES if max_bytes is None and corpus is None else max_bytes
        return job.run(output, corpus=corpus, max_bytes=limit, beam_options=context.args, **options)

    _report(_run(start))


@main.command("web_text", context_settings=_PASS_ON)
@_READING
@click.option(
    "--extractor",
    type=click.Choice(["trafilatura", "resiliparse"]),
    default="trafilatura",
    show_default=True,
    help="Text out of HTML: faithful, or 20 times as fast.",
)
@click.option(
    "--rules",
    default="internlm2_text",
    show_default=True,
    metavar="NAME|FILE",
    help="A preset or a YAML file of rules.",
)
@click.option(
    "--language",
    "languages",
    multiple=True,
    metavar="TAG",
    help="Keep only these languages (en, zh ...); may be repeated.",
)
@click.option(
    "--language-backend", type=click.Choice(["cld2", "fasttext"]), default="cld2", show_default=True
)
@click.option("--language-model", default="", metavar="FILE", help="Of the fasttext backend.")
@click.option(
    "--domain-list",
    "domain_lists",
    multiple=True,
    metavar="FILE",
    help="Domains to drop, one a line; may be repeated.",
)
@click.option(
    "--word-list",
    "word_lists",
    multiple=True,
    metavar="FILE",
    help="Words and phrases to count, one a line; may be repeated.",
)
@click.option(
    "--max-blocked-words",
    default=3,
    show_default=True,
    help="Listed words that a document may hold.",
)
@click.option(
    "--classifier",
    "classifiers",
    multiple=True,
    metavar="NAME=DIR",
    help="toxicity, pornography, advertisement or fluency, trained; may be repeated.",
)
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    metavar="NAME=PATH",
    help="Drop documents that hold questions of this evaluation set.",
)
@click.option("--cut-personal-data", is_flag=True, help="Cut out e-mail and IP addresses.")
@click.option("--dedup-lines", is_flag=True, help="Cut lines that other documents have already.")
@_NEAR
@_NEAR_GUARDS
@click.pass_context
def web_text(context: click.Context, **options: Any):
    """Web pages and other text: extract, clean, de-duplicate, make safe, select."""
    from data_beam.dedup.lines import RepeatedLines
    from data_beam.dedup.near import NearDuplicates
    from data_beam.pipelines import web_text as job

    def start() -> dict[str, Any]:
        near = NearDuplicates(**{name: options.pop(name) for name in _NEAR_NAMES})
        lines = RepeatedLines() if options.pop("dedup_lines") else None
        reading = _reading(options, extractor=options.pop("extractor"))
        classifiers = dict(_pair(text) for text in options.pop("classifiers"))
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
        }
        settings = job.WebText(near=near, lines=lines, classifiers=classifiers, **fields)
        return job.run(settings=settings, beam_options=context.args, **reading)

    _report(_run(start))


@main.command(context_settings=_PASS_ON)
@_READING
@click.option("--rules", default="internlm2_code", show_default=True, metavar="NAME|FILE")
@click.option(
    "--licences",
    type=click.Choice(["any", "permissive"]),
    default="any",
    show_default=True,
    help="Whose files to keep.",
)
@click.option("--drop-unlicensed", is_flag=True, help="Drop files for which none is stated.")
@click.option(
    "--repo-depth",
    default=1,
    show_default=True,
    help="Folders between the input folder and its repositories.",
)
@click.option(
    "--scorer",
    default="",
    metavar="DIR",
    help="Trained classifier of bad code; grades where it agrees with labels or rules.",
)
@click.option(
    "--labels",
    default="",
    metavar="FILE",
    help='What people said of files: JSON lines {"id", "label": 1 = bad}.',
)
@_NEAR
@_NEAR_GUARDS
@click.pass_context
def code(
    context: click.Context, repo_depth: int, scorer: str, labels: str, **options: Any
):  # fmt: skip
    """Repositories: clean, de-duplicate, grade, sort by imports, one document each."""
    from data_beam.dedup.near import NearDuplicates
    from data_beam.pipelines import code as job
    from data_beam.pipelines.graded_code import Grades

    def start() -> dict[str, Any]:
        near = NearDuplicates(**{name: options.pop(name) for name in _NEAR_NAMES})
        reading = _reading(options, repo_depth=repo_depth)
        grading = Grades(model=scorer, labels=labels)
        settings = job.Code(near=near, grades=grading, **options)
        return job.run(settings=settings, beam_options=context.args, **reading)

    _report(_run(start))


@main.command("long_context", context_settings=_PASS_ON)
@_READING
@click.option("--model", metavar="DIR", help="Folder of a stage with a language model.")
@click.option("--rules", default="internlm2_long", show_default=True, metavar="NAME|FILE")
@click.option("--context", default=3072, show_default=True, help="Tokens before the scored span.")
@click.option("--target", default=1024, show_default=True, help="Tokens of the scored span.")
@click.option("--pairs", default=4, show_default=True, help="Spans scored per document.")
@click.pass_context
def long_context(
    context_: click.Context, context: int, target: int, pairs: int, max_removed_share: float,
    **options: Any,
):  # fmt: skip
    """Long, coherent documents: length, statistics, perplexity with and without context."""
    from data_beam.pipelines import long_context as job
    from data_beam.scoring.perplexity import Protocol

    def start() -> dict[str, Any]:
        reading = _reading(options)
        protocol = Protocol(target=target, context=context, pairs=pairs, seed=options["seed"])
        settings = job.LongContext(protocol=protocol, **options)
        return job.run(settings=settings, beam_options=context_.args, **reading)

    _report(_run(start))


@main.command(context_settings=_PASS_ON)
@_READING
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    required=True,
    metavar="NAME=PATH[:FIELD,...]",
    help="An evaluation set; may be repeated.",
)
@click.option(
    "--action",
    type=click.Choice(["drop", "cut"]),
    default="drop",
    show_default=True,
    help="Drop the document, or cut what matches out of it.",
)
@click.option(
    "--ignore-common",
    default=0,
    metavar="N",
    help="Runs of 13 words in more than N documents are nobody's question.  [default: all count]",
)
@click.pass_context
def decontaminate(context: click.Context, max_removed_share: float, **options: Any):
    """Remove what evaluation sets ask."""
    from data_beam.pipelines import decontaminate as job

    def start() -> dict[str, Any]:
        reading = _reading(options)
        options["benchmarks"] = tuple(options["benchmarks"])
        return job.run(settings=job.Decontaminate(**options), beam_options=context.args, **reading)

    _report(_run(start))


@main.command(context_settings=_PASS_ON)
@click.option("--input", "corpus_path", required=True, metavar="DIR", help="Folder of a corpus.")
@click.option(
    "--tokenizer", "tokenizer_model", required=True, metavar="FILE", help="SentencePiece model."
)
@_OUTPUT
@click.option("--tokens-per-record", default=1 << 16, show_default=True)
@click.option("--threads", type=int, metavar="N", help="Of a worker.  [default: its cores]")
@click.option(
    "--max-dead-share",
    default=0.01,
    show_default=True,
    help="Fail when more of the documents cannot be tokenised.",
)
@click.pass_context
def tokenize(context: click.Context, **options: Any):
    """Tokenise a corpus for training."""
    from data_beam import cache

    manifest = _run(lambda: cache.run(beam_options=context.args, **options))
    click.echo(json.dumps(manifest["splits"], indent=2))


@main.command()
@click.argument("output", metavar="DIR")
@click.option(
    "--id",
    "identity",
    metavar="ID",
    help="Tell one document's history: an id, the beginning of one, or a path.",
)
@click.option("--output", "page", metavar="FILE", help="The page.  [default: DIR/inspect.html]")
@click.option("--max-shards", type=int, metavar="N", help="Count over so many shards only.")
@click.option(
    "--classifier",
    "classifiers",
    multiple=True,
    metavar="NAME=DIR",
    help="Show this classifier's curves; may be repeated.",
)
def inspect(
    output: str, identity: str | None, page: str | None, max_shards: int | None,
    classifiers: tuple[str, ...],
):  # fmt: skip
    """Look at a corpus: one page, or the history of one document."""
    from data_beam.inspect import history
    from data_beam.inspect import page as pages

    def start() -> list[str]:
        if identity is not None:
            return history.history(output, identity)
        folders = dict(map(_pair, classifiers)) or None
        path = pages.build(output, page, max_shards=max_shards, classifier_folders=folders)
        return [f"wrote {path}"]

    for line in _run(start):
        click.echo(line)


def _reading(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Takes the options of reading out of `options`: keywords of a pipeline's run."""
    from data_beam.io import corpus_folder, readers

    known = {"exclude": tuple(options.pop("exclude")), **more}
    for name in ("require_id", "dump", "extraction_timeout"):
        known[name] = options.pop(name)
    for name in ("source", "text_field"):
        if (value := options.pop(name)) is not None:
            known[name] = value
    names = ("inputs", "output", "shards", "wave_bytes", "max_dead_share")
    reading = {name: options.pop(name) for name in names}
    corpus_folder.check_work_folder(reading["output"], reading["inputs"])
    return {**reading, "read": readers.ReadOptions(**known)}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"{text!r} is not of the form NAME=PATH")
    return name, value


def _run(job: Callable[[], Result]) -> Result:
    try:
        return job()
    except UserError as error:
        print(f"error: {_with_own_options(error)}", file=sys.stderr)
        sys.exit(2)


def _with_own_options(error: UserError) -> UserError:
    """An option that Beam does not know is more likely one of this command's, misspelt."""
    runners = sys.modules.get("data_beam.runners")  # which imports Beam
    if runners is None or not isinstance(error, runners.UnknownOption):
        return error
    options = (o[2:] for each in click.get_current_context().command.params for o in each.opts)
    close = difflib.get_close_matches(error.name.replace("_", "-"), options, 1)
    return runners.UnknownOption(error.name, close) if close else error


def _report(funnel: dict[str, Any]) -> None:
    for row in funnel["stages"]:
        click.echo(_line(row))


def _line(row: dict[str, Any]) -> str:
    dropped = ", ".join(
        f"{reason} {count['documents']:,}" for reason, count in sorted(row["dropped"].items())
    )
    if "assembled" in row:
        made = f"into {row['assembled']['documents']:,} documents"
        dropped = f"{made}; {dropped}" if dropped else made
    return (
        f"{row['stage']:<12} {row['documents_in']:>9,} -> {row['documents_out']:>9,} "
        f"{row['unit']}s, {row['bytes_out'] / 1e6:>8.1f} MB" + (f"  ({dropped})" if dropped else "")
    )


if __name__ == "__main__":
    main(prog_name="python -m data_beam")
