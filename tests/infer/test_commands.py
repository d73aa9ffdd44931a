"""`internlm2 generate`, `chat` and `serve` as a person types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest

from internlm2_jax import cli
from internlm2_jax.errors import UserError
from internlm2_jax.infer.commands import Conversation
from internlm2_jax.infer.engine import Engine, EngineConfig
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models import convert

SIZES = EngineConfig(slots=1, max_length=256, page=16, prefill=((1, 32),), steps=4)


@pytest.fixture(scope="module")
def folder(tiny_chat, vocabulary, tmp_path_factory):
    """A Hugging Face folder with a tokenizer."""
    model, params = tiny_chat
    path = tmp_path_factory.mktemp("model") / "tiny"
    convert.save_hf(path, model.cfg, params, "float32")
    file = next(tmp_path_factory.getbasetemp().glob("vocabulary*/tokenizer.model"))
    shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def engine(tiny_chat, vocabulary):
    return Engine(*tiny_chat, SIZES, vocabulary)


@pytest.fixture
def talk(engine, vocabulary):
    return Conversation(engine, vocabulary, Sampling(1.0), 12, seed=0)


def said(talk, line):
    pieces = []
    talk.say(line, pieces.append)
    return "".join(pieces)


def test_a_conversation(talk):
    answer = said(talk, "Hello")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert answer == talk.messages[1]["content"] + "\n"
    said(talk, "And then?")
    assert len(talk.messages) == 4
    assert said(talk, "/undo") == "taken back\n"
    assert len(talk.messages) == 2
    said(talk, "/system Be brief.")
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    said(talk, "   ")
    assert len(talk.messages) == 1
    said(talk, "/system")
    assert talk.messages == []
    assert "/tools FILE" in said(talk, "/help")


def test_tool_turns(engine, vocabulary, tmp_path):
    pytest.importorskip("llguidance")
    tools = [{"name": "look", "parameters": {"enum": [{}]}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    # Sharp sampling of another seed each: some conversation calls the tool within a few tries.
    for seed in range(40):
        talk = Conversation(engine, vocabulary, Sampling(3.0), 120, seed)
        said(talk, f"/tools {tmp_path / 'tools.json'}")
        assert talk.messages[0]["name"] == "plugin"
        answer = said(talk, "Look!")
        if talk.turn == "plugin":
            break
    else:
        pytest.fail("no call in 40 conversations")
    assert "[plugin] {" in answer
    assert json.loads(talk.messages[-1]["tool_call"]["content"])["name"] == "look"
    said(talk, "a hill")
    assert talk.messages[-2] == {"role": "environment", "name": "plugin", "content": "a hill"}


def test_a_full_conversation_and_bad_commands_leave_it_as_it_was(talk, tmp_path):
    said(talk, "Hello")
    before = list(talk.messages)
    with pytest.raises(UserError, match="filled its --max-length"):
        said(talk, "word " * 300)
    for line, message in [
        ("/nonsense", "no command /nonsense"),
        (f"/tools {tmp_path / 'none.json'}", "cannot read the tools"),
    ]:
        with pytest.raises(UserError, match=message):
            said(talk, line)
    assert talk.messages == before


def test_an_interrupt_stops_the_answer_only(engine, talk):
    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("Hello", stop)
    assert talk.messages == [] and not engine.busy and engine.held_pages == 0
    assert said(talk, "Hello")


def test_chat_on_the_command_line(folder, monkeypatch, capsys):
    lines = iter(["Hello", "/nonsense", "/quit"])
    monkeypatch.setattr("click.prompt", lambda *_, **__: next(lines))
    monkeypatch.setattr(
        "sys.argv",
        ["internlm2", "chat", str(folder), "--max-length", "128", "--max-new-tokens", "5"],
    )
    cli.main()
    out, err = capsys.readouterr()
    assert "2 pages of 64 take 0.0 MiB" in err and "error: no command /nonsense" in err
    assert out.count("\n") >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "nowhere"], "nowhere"),
        (["chat", "FOLDER", "--temperature", "-1"], "temperature is -1"),
        (["chat", "FOLDER", "--max-length", "99999"], "passes the model's 1024 positions"),
        (["serve", "FOLDER", "--slots", "0"], "slots is 0"),
        (["serve", "FOLDER", "--cache", "int3"], "no cache type 'int3'"),
    ],
)
def test_bad_arguments_are_one_line(folder, monkeypatch, capsys, arguments, message):
    given = [str(folder) if a == "FOLDER" else a for a in arguments]
    monkeypatch.setattr("sys.argv", ["internlm2", *given])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err and "Traceback" not in err


@pytest.mark.slow
def test_serve_on_the_command_line(folder):
    command = [sys.executable, "-m", "internlm2_jax.cli", "serve", str(folder), "--port", "18761",
               "--max-length", "128", "--slots", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen("http://127.0.0.1:18761/v1/models") as answer:
                    assert json.load(answer)["data"][0]["id"] == "tiny"
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert "serving tiny on http://127.0.0.1:18761/v1" in err and "Traceback" not in err
