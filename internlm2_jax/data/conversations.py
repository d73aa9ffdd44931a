"""Conversations in the formats that people have, read into the messages of chat.py, and validated.

    messages   {"messages": [{"role", "content"}, ...]}      OpenAI's and ours (chat.py); "tools"
    sharegpt   {"conversations": [{"from", "value"}, ...]}   "system", "tools"
    alpaca     {"instruction", "input", "output"}            "system", "history": [[ask, answer]]
    seqio      "seqio:MODULE:TASK" in place of a file: "inputs" and "targets" of its examples, as
               text; the module registers the task

A file is JSON lines or one JSON array. A bad record is told by its file and line and by what is
wrong in it; all of them are looked for before anything is said, so one run finds them all.

An answer with "loss": false is context and is not learnt.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from internlm2_jax.data import chat
from internlm2_jax.errors import UserError

Format = Literal["auto", "messages", "sharegpt", "alpaca"]
Row = dict[str, Any]
SHOWN = 20  # bad records that an error lists
_SEQIO = "seqio:"


class _Bad(ValueError):
    """What is wrong with a record, without its place."""


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that cannot be used: where it is and what is wrong."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read(
    paths: Sequence[str | Path], form: Format = "auto", *, split: str = "train"
) -> tuple[list[Row], list[Bad]]:
    """(rows {"messages": [...]}, bad records) of files and seqio tasks, in their order.

    Args:
      form: format of the files; "auto" tells it by the fields of each record.
      split: of seqio tasks.

    Errors: UserError when a file is missing, is no text, or is no JSON from its first line on.
    """
    if form not in get_args(Format):
        raise UserError(f"format is {form!r}; it is one of {', '.join(get_args(Format))}")
    rows, bad = [], []
    for path in map(str, paths):
        records = _seqio(path, split) if path.startswith(_SEQIO) else _records(path)
        for line, record in records:
            try:
                if isinstance(record, _Bad):
                    raise record
                rows.append({"messages": _messages(record, form)})
            except (_Bad, UserError) as error:
                bad.append(Bad(path, line, str(error)))
    return rows, bad


def load(
    paths: Sequence[str | Path],
    form: Format = "auto",
    *,
    skip_bad: bool = False,
    split: str = "train",
) -> list[Row]:
    """The rows of `read`. Errors: UserError that lists the bad records, unless they are skipped."""
    rows, bad = read(paths, form, split=split)
    if bad and not skip_bad:
        raise UserError(explain(bad, len(rows) + len(bad)))
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))}: no conversation to learn from")
    return rows


def explain(bad: Sequence[Bad], total: int) -> str:
    """One line that says how many records are bad, then the first of them."""
    more = [f"... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    head = f"{len(bad)} of {total} records cannot be used; mend them, or skip them (skip_bad)"
    return "\n  ".join([head, *map(str, bad[:SHOWN]), *more])


# ------------------------------------------------------------------------------ files


def _records(path: str) -> Iterator[tuple[int, Any]]:
    """(line where it begins, record or _Bad) of JSON lines or of one JSON array."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: byte {error.object[error.start]:#04x} is not UTF-8; convert the file"
        ) from error
    if text.lstrip().startswith("["):
        yield from _array(path, text)
        return
    for number, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield number, json.loads(content)
            except (ValueError, RecursionError) as error:
                yield number, _Bad(f"not JSON ({error})")


_BETWEEN = re.compile(r"\s*,?\s*")


def _array(path: str, text: str) -> Iterator[tuple[int, Any]]:
    decoder, line, seen = json.JSONDecoder(), 1, 0
    at = text.index("[") + 1
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        line, seen = line + text.count("\n", seen, at), at
        if text[at : at + 1] == "]":
            return
        try:
            record, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}:{line}: the array is not JSON from here on ({error}); mend it"
            ) from error
        yield line, record
        at = end


def _seqio(name: str, split: str) -> Iterator[tuple[int, Any]]:
    """Examples of a registered seqio task or mixture as records, counted from 1."""
    try:
        import seqio
    except ImportError as error:
        raise UserError(
            f"{name} needs the seqio extra ({error}): pip install 'internlm2-jax[seqio]'"
        ) from error
    module, _, wanted = name.removeprefix(_SEQIO).rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        task = seqio.get_mixture_or_task(wanted)
    except (ImportError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"{name}: {reason}; write it seqio:MODULE:TASK, where MODULE registers TASK"
        ) from error
    lengths = dict.fromkeys(task.output_features, None)
    examples = task.get_dataset(lengths, split=split, shuffle=False, num_epochs=1)
    for number, example in enumerate(examples.as_numpy_iterator(), start=1):
        yield number, _of_example(example)


def _of_example(example: Mapping[str, Any]) -> Row | _Bad:
    """The text before tokens of a seqio example, as seqio's tokenize keeps it."""
    texts = []
    for field in ("inputs", "targets"):
        value = example.get(f"{field}_pretokenized", example.get(field))
        if not isinstance(value, (bytes, str)):
            return _Bad(f"the example has no text {field!r} or '{field}_pretokenized'")
        texts.append(value.decode() if isinstance(value, bytes) else value)
    return {"instruction": texts[0], "output": texts[1]}


# ------------------------------------------------------------------------------ formats

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "environment": "environment",
    "tool": "environment",
    "function": "environment",
    "observation": "environment",
    "function_response": "environment",
}
_PLUGIN = {"tool", "function", "observation", "function_response"}


def _messages(record: Any, form: Format) -> list[Row]:
    """The messages of a record, checked: they can be rendered and something in them is learnt."""
    if not isinstance(record, Mapping):
        raise _Bad(f"a record is an object, this is {type(record).__name__}")
    form = _form(record) if form == "auto" else form
    messages = _FORMATS[form](record)
    if record.get("tools"):
        tools = record["tools"]
        text = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        messages.insert(0, {"role": "system", "name": "plugin", "content": text})
    chat.check(messages)
    answers = [m for m in messages if m["role"] == "assistant" and m.get("loss", True)]
    if not answers:
        raise _Bad("no assistant turn to learn from")
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not (message["content"] or message.get("tool_call")):
            raise _Bad(f"messages[{index}] is an empty answer")
    if all(m["role"] in ("system", "assistant") for m in messages):
        raise _Bad("nobody asks: there is no user or environment turn")
    return messages


def _form(record: Mapping[str, Any]) -> Format:
    keys: dict[str, Format] = {
        "messages": "messages",
        "conversations": "sharegpt",
        "instruction": "alpaca",
    }
    found = [key for key in keys if key in record]
    if len(found) != 1:
        has = ", ".join(map(str, list(record)[:6])) or "no field"
        raise _Bad(f"it needs one of messages, conversations, instruction; it has {has}")
    return keys[found[0]]


def _openai(record: Mapping[str, Any]) -> list[Row]:
    return [
        _turn(f"messages[{i}]", m, "role", "content")
        for i, m in enumerate(_list(record, "messages"))
    ]


def _sharegpt(record: Mapping[str, Any]) -> list[Row]:
    turns = _list(record, "conversations")
    messages = [_turn(f"conversations[{i}]", turn, "from", "value") for i, turn in enumerate(turns)]
    return [*_system(record), *messages]


def _alpaca(record: Mapping[str, Any]) -> list[Row]:
    messages = _system(record)
    for i, turn in enumerate(record.get("history") or []):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise _Bad(f"history[{i}] is not a pair [question, answer]")
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    asked = [record.get("instruction"), record.get("input") or ""]
    for name, value in zip(("instruction", "input"), asked, strict=True):
        if not isinstance(value, str):
            raise _Bad(f"{name} is {type(value).__name__}; it must be text")
    if not isinstance(record.get("output"), str):
        raise _Bad("output is missing or no text")
    question = "\n".join(text for text in asked if text)
    if not question.strip():
        raise _Bad("instruction and input are both empty")
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": record["output"]},
    ]


_FORMATS: dict[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "messages": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def _system(record: Mapping[str, Any]) -> list[Row]:
    return [{"role": "system", "content": record["system"]}] if record.get("system") else []


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type(value).__name__
        raise _Bad(f"{name} is {what}; it must be a list of turns")
    return value


def _turn(where: str, turn: Any, role_field: str, text_field: str) -> Row:
    """A message of chat.py; other names of roles, and OpenAI's tool calls, become its own."""
    if not isinstance(turn, Mapping):
        raise _Bad(f"{where} is {type(turn).__name__}; it must be an object")
    for field in (role_field, text_field):
        if field not in turn:
            raise _Bad(f"{where} has no {field!r}")
    said, text = turn[role_field], turn[text_field]
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise _Bad(f"{where} {role_field} is {said!r}; it is one of {', '.join(_ROLES)}")
    others = {"tool_calls", "tool_call_id", role_field, text_field}
    message = {name: value for name, value in turn.items() if name not in others}
    message |= {"role": role, "content": "" if text is None else text}
    if said in _PLUGIN:
        message["name"] = "plugin"  # the tool's own name stands in the call
    if said == "function_call":
        message |= {"content": "", "tool_call": {"tool": "plugin", "content": text}}
    if calls := turn.get("tool_calls"):
        if not isinstance(calls, list) or len(calls) != 1:
            raise _Bad(f"{where} has {len(calls)} tool calls; a turn of this format makes one")
        message["tool_call"] = {"tool": "plugin", "content": _call(where, calls[0])}
    return message


def _call(where: str, call: Any) -> str:
    """OpenAI's {"function": {"name", "arguments"}} as InternLM2 writes a plugin call."""
    try:
        function = call["function"]
        given = function["arguments"]
        arguments = json.loads(given) if isinstance(given, str) else given
        return json.dumps({"name": function["name"], "parameters": arguments}, ensure_ascii=False)
    except (KeyError, TypeError, ValueError) as error:
        raise _Bad(f"{where} tool_calls[0] has no function with name and arguments") from error
