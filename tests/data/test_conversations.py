"""Conversations of every format become the same messages; bad records are named by their line."""

from __future__ import annotations

import json
import re
import types

import pytest
from click.testing import CliRunner

from internlm2_jax.data import conversations
from internlm2_jax.data.commands import conversations as command
from internlm2_jax.errors import UserError

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def lines(tmp_path, *records, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"instruction": "Hi", "input": "", "output": "Hello."},
    ],
    ids=["messages", "sharegpt", "alpaca"],
)
@pytest.mark.parametrize("array", [False, True])
def test_formats_are_told_by_their_fields(tmp_path, record, array):
    path = tmp_path / "data"
    path.write_text(json.dumps([record], indent=1) if array else json.dumps(record) + "\n")
    assert conversations.load([path]) == [{"messages": ASKED}]


def test_system_history_and_input_of_alpaca(tmp_path):
    record = {
        "system": "Be brief.",
        "history": [["1 + 1?", "2"]],
        "instruction": "Translate.",
        "input": "chat",
        "output": "cat",
    }
    (row,) = conversations.load([lines(tmp_path, record)])
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("system", "Be brief."),
        ("user", "1 + 1?"),
        ("assistant", "2"),
        ("user", "Translate.\nchat"),
        ("assistant", "cat"),
    ]


def test_tool_calls_become_plugin_turns(tmp_path):
    arguments = {"city": "Köln"}
    call = {"id": "1", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    openai = {
        "tools": [{"name": "weather"}],
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "no", "tool_call_id": "1"},
            {"role": "assistant", "content": "No."},
        ],
    }
    spoken = json.dumps({"name": "weather", "parameters": arguments}, ensure_ascii=False)
    sharegpt = {
        "tools": '[{"name": "weather"}]',
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": spoken},
            {"from": "observation", "value": "no"},
            {"from": "gpt", "value": "No."},
        ],
    }
    a, b = conversations.load([lines(tmp_path, openai, sharegpt)])
    assert a == b
    assert a["messages"][0] == {
        "role": "system", "name": "plugin", "content": '[{"name": "weather"}]',
    }  # fmt: skip
    assert a["messages"][2]["tool_call"] == {"tool": "plugin", "content": spoken}
    assert a["messages"][3] == {"role": "environment", "name": "plugin", "content": "no"}


BAD = {
    "not JSON": "{oops\n",
    "a record is an object, this is int": 7,
    "it needs one of messages, conversations, instruction; it has text": {"text": "x"},
    "messages is an empty list": {"messages": []},
    "messages[0] role is 'robot'": {"messages": [{"role": "robot", "content": "x"}]},
    "messages[1] has no 'content'": {"messages": [ASKED[0], {"role": "assistant"}]},
    "messages[1] content is int; it must be text": {
        "messages": [ASKED[0], {"role": "assistant", "content": 3}]
    },
    "no assistant turn to learn from": {"messages": [ASKED[0], {**ASKED[1], "loss": False}]},
    "messages[1] is an empty answer": {"messages": [ASKED[0], {**ASKED[1], "content": ""}]},
    "nobody asks": {"messages": [ASKED[1]]},
    "output is missing or no text": {"instruction": "x"},
    "history[0] is not a pair": {"instruction": "x", "output": "y", "history": [["a"]]},
    "conversations[0] has no 'value'": {"conversations": [{"from": "human"}]},
    "has 2 tool calls": {"messages": [ASKED[0], {**ASKED[1], "tool_calls": [1, 2]}]},
    "has no function with name": {"messages": [ASKED[0], {**ASKED[1], "tool_calls": [{}]}]},
}


def test_all_bad_records_are_named_at_once(tmp_path):
    path = lines(tmp_path, {"messages": ASKED}, *BAD.values())
    with pytest.raises(UserError) as caught:
        conversations.load([path])
    said = str(caught.value)
    assert said.startswith(f"{len(BAD)} of {len(BAD) + 1} records cannot be used")
    for number, reason in enumerate(BAD, start=2):
        assert re.search(rf"{re.escape(str(path))}:{number}: .*{re.escape(reason)}", said), reason
    assert conversations.load([path], skip_bad=True) == [{"messages": ASKED}]


def test_no_more_than_a_screen_of_them_is_shown(tmp_path):
    with pytest.raises(UserError, match=r"\.\.\. and 30 more") as caught:
        conversations.load([lines(tmp_path, *["1\n"] * 50)])
    assert len(str(caught.value).splitlines()) == conversations.SHOWN + 2


def test_a_record_of_an_array_is_named_by_the_line_where_it_begins(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": ASKED}, {"messages": []}], indent=2))
    (bad,) = conversations.read([path])[1]
    text = path.read_text().splitlines()
    assert json.loads("".join(text[bad.line - 1 : -1]))["messages"] == []
    path.write_text('[{"messages": \n[}]')
    with pytest.raises(UserError, match=r"data\.json:1: the array is not JSON from here on"):
        conversations.read([path])


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        conversations.read([tmp_path / "absent"])
    (tmp_path / "latin").write_bytes(b'{"a": 1}\n"\xe9"')
    with pytest.raises(UserError, match="latin:2: byte 0xe9 is not UTF-8"):
        conversations.read([tmp_path / "latin"])
    with pytest.raises(UserError, match="no conversation to learn from"):
        conversations.load([lines(tmp_path, "\n")])


def test_a_seqio_task_is_read_as_questions_and_answers(monkeypatch):
    """Against the part of seqio that is used; tests/data_beam/test_tasks.py has the real one."""
    examples = [
        {"inputs_pretokenized": b"2 + 2?", "inputs": [5], "targets_pretokenized": b"4"},
        {"inputs": [5], "targets": [6]},
    ]
    data = types.SimpleNamespace(as_numpy_iterator=lambda: iter(examples))
    task = types.SimpleNamespace(
        output_features={"inputs": 0, "targets": 0}, get_dataset=lambda lengths, **_: data
    )
    module = types.SimpleNamespace(get_mixture_or_task={"sums": task}.__getitem__)
    monkeypatch.setitem(__import__("sys").modules, "seqio", module)
    rows, bad = conversations.read(["seqio:sums"])
    assert [m["content"] for m in rows[0]["messages"]] == ["2 + 2?", "4"]
    assert str(bad[0]).startswith("seqio:sums:2: the example has no text 'inputs'")
    with pytest.raises(UserError, match="write it seqio:MODULE:TASK"):
        conversations.read(["seqio:no_such_module:sums"])


def test_the_command_describes_and_marks_what_is_learnt(tmp_path, vocabulary, tmp_path_factory):
    path = lines(tmp_path, {"messages": ASKED}, {"messages": []})
    refused = CliRunner().invoke(command, [str(path)])
    assert isinstance(refused.exception, UserError)
    model = next(tmp_path_factory.getbasetemp().glob("vocabulary*/tokenizer.model"))
    said = CliRunner().invoke(
        command, [str(path), "--skip-bad", "--tokenizer", str(model), "--row-length", "64"]
    )
    assert said.exit_code == 0, said.output
    assert "1 conversations, 2 turns" in said.output
    assert ">>Hello.<|im_end|><<" in said.output
    assert "rows of 64 tokens: 1" in said.output
