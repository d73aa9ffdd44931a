"""`internlm2 conversations`: looks at conversations before anything is trained on them."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, get_args

import click

from internlm2_jax.data.conversations import Format
from internlm2_jax.errors import UserError

SHARES = (0, 50, 90, 99, 100)  # percentiles of the lengths


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--format", "form", type=click.Choice(get_args(Format)), default="auto")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.model, or a folder with it: also count tokens and show what is learnt.",
)
@click.option("--row-length", default=4096, show_default=True, help="Tokens of a packed row.")
@click.option("--learn", type=click.Choice(["all", "last"]), default="all", show_default=True)
@click.option("--skip-bad", is_flag=True, help="Report bad records and go on without them.")
@click.option("--show", default=1, show_default=True, help="How many conversations to print.")
def conversations(
    files: tuple[str, ...],
    form: Any,
    tokenizer: Path | None,
    row_length: int,
    learn: Any,
    skip_bad: bool,
    show: int,
) -> None:
    """Check and describe FILES of conversations: messages, ShareGPT, Alpaca; seqio:MODULE:TASK.

    Every bad record is named by its line. With a tokenizer, what the model learns stands between
    >> and <<.
    """
    from internlm2_jax.data import conversations as reader

    rows, bad = reader.read(files, form)
    if bad:
        message = reader.explain(bad, len(rows) + len(bad))
        if not skip_bad or not rows:
            raise UserError(message)
        click.echo(message, err=True)
    if not rows:
        raise UserError(f"{', '.join(files)}: no conversation")
    for line in _described(rows):
        click.echo(line)
    if tokenizer is not None:
        _with_tokens(rows, tokenizer, row_length, learn, show)


def _described(rows: list[dict[str, Any]]) -> list[str]:
    messages = [message for row in rows for message in row["messages"]]
    roles = collections.Counter(
        message["role"] + (f" {message['name']}" if "name" in message else "")
        for message in messages
    )
    calls = collections.Counter(
        message["tool_call"]["tool"] for message in messages if "tool_call" in message
    )
    return [
        f"{len(rows):,} conversations, {len(messages):,} turns",
        "turns: " + ", ".join(f"{n:,} {role}" for role, n in roles.most_common()),
        *(["calls: " + ", ".join(f"{n:,} {tool}" for tool, n in calls.items())] if calls else []),
    ]


def _with_tokens(
    rows: list[dict[str, Any]], tokenizer: Path, row_length: int, learn: Any, show: int
) -> None:
    import numpy as np

    from internlm2_jax.data import chat
    from internlm2_jax.data.packing import ExampleSource
    from internlm2_jax.data.tokenizer import Tokenizer

    path = tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer
    vocabulary = Tokenizer.load(path)
    rendered = [chat.render(row["messages"], vocabulary, learn=learn) for row in rows]
    lengths = np.array([len(r.ids) for r in rendered])
    learnt = sum(sum(r.loss_mask) for r in rendered)
    shown = ", ".join(
        f"{share}%: {length:,.0f}"
        for share, length in zip(SHARES, np.percentile(lengths, SHARES), strict=True)
    )
    click.echo(f"tokens: {lengths.sum():,}, learnt {learnt:,} ({learnt / lengths.sum():.0%})")
    click.echo(f"tokens of a conversation, percentiles: {shown}")
    source = ExampleSource([(r.ids, r.loss_mask) for r in rendered], row_length)
    click.echo(
        f"rows of {row_length:,} tokens: {len(source):,}, {source.fill_rate:.1%} full; "
        f"{source.num_dropped:,} conversations are too long for one"
    )
    for r in rendered[:show]:
        click.echo("\n" + _marked(r, vocabulary))


def _marked(rendered: Any, vocabulary: Any) -> str:
    """The text of a conversation, special tokens by name, with what is learnt between >> and <<."""
    pieces, start = [], 0
    mask = rendered.loss_mask
    for i in range(1, len(mask) + 1):
        if i == len(mask) or mask[i] != mask[start]:
            text = vocabulary.show(rendered.ids[start:i])
            pieces.append(f">>{text}<<" if mask[start] else text)
            start = i
    return "".join(pieces)
