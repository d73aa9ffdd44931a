"""Command line: `python -m data_beam corpus|tokenize ... [any Beam option]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from internlm2_jax.errors import UserError

# What is not an option of ours goes to Beam: --runner, --direct_num_workers, --flink_master ...
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Beam jobs: raw files to a corpus, a corpus to tokens."""


@main.command(context_settings=_PASS_ON)
@click.option(
    "--input",
    "corpus",
    metavar="DIR",
    help="Folder with text and code files. Without it: what this machine holds.",
)
@click.option("--output", required=True, metavar="DIR", help="Folder to write the corpus to.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--max-bytes",
    type=int,
    metavar="N",
    help="Read about N bytes at most. Default: all of --input, 28 MB of a machine.",
)
@click.option(
    "--threshold",
    default=0.7,
    show_default=True,
    help="Jaccard similarity from which two documents count as copies.",
)
@click.option("--ngram", default=5, show_default=True, help="Words per shingle.")
@click.option("--num-perm", default=128, show_default=True, help="Hashes per signature.")
@click.option("--bands", default=16, show_default=True)
@click.option("--rows", default=8, show_default=True, help="Hashes per band.")
@click.option("--validation-fraction", default=0.02, show_default=True)
@click.option("--shards", default=2, show_default=True, help="Training shards per source.")
@click.pass_context
def corpus(context: click.Context, corpus: str | None, max_bytes: int | None, **options: Any):
    """Build a corpus: read, normalise, filter, remove duplicates, split. Options that are not
    listed go to Beam."""
    from data_beam.pipelines import corpus as job

    if max_bytes is None and corpus is None:
        max_bytes = job.MACHINE_BYTES
    funnel = _run(
        lambda: job.run(corpus=corpus, max_bytes=max_bytes, beam_options=context.args, **options)
    )
    for row in funnel["stages"]:
        click.echo(_line(row))


@main.command(context_settings=_PASS_ON)
@click.option("--input", "corpus_path", required=True, metavar="DIR", help="Folder of a corpus.")
@click.option(
    "--tokenizer", "tokenizer_model", required=True, metavar="FILE", help="SentencePiece model."
)
@click.option("--output", required=True, metavar="DIR", help="Folder to write the tokens to.")
@click.pass_context
def tokenize(context: click.Context, **options: Any):
    """Tokenise a corpus for training. Options that are not listed go to Beam."""
    from data_beam import cache

    manifest = _run(lambda: cache.run(beam_options=context.args, **options))
    click.echo(json.dumps(manifest["splits"], indent=2))


def _run(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _line(row: dict[str, Any]) -> str:
    dropped = ", ".join(
        f"{reason} {count['documents']:,}" for reason, count in sorted(row["dropped"].items())
    )
    return (
        f"{row['stage']:<12} {row['documents_in']:>9,} -> {row['documents_out']:>9,} "
        f"{row['unit']}s, {row['bytes_out'] / 1e6:>8.1f} MB" + (f"  ({dropped})" if dropped else "")
    )


if __name__ == "__main__":
    main(prog_name="python -m data_beam")
