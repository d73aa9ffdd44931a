"""Interpreter calls of a chat: what the model is told, and that it goes on."""

from __future__ import annotations

import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.infer.commands import MOST_CALLS, Conversation
from internlm2_jax.infer.interpreter import Interpreter
from internlm2_jax.infer.sampling import Sampling


@pytest.fixture
def interpreter():
    try:
        one = Interpreter(timeout=0.5, longest=200)
    except UserError as error:
        pytest.skip(str(error))
    yield one
    one.close()


def test_what_a_call_is_told(interpreter):
    assert interpreter("```python\nx = 6\nprint('so')\nx * 7\n```") == "so\n42"
    assert interpreter("```python\nx + 1") == "7"
    assert interpreter("y = x") == "(no output)"
    assert interpreter("1 / 0").endswith("ZeroDivisionError: division by zero")
    assert interpreter("import time\ntime.sleep(9)") == "Stopped after 0.5 s."
    assert interpreter("y") == "6"
    assert len(interpreter("'a' * 10_000")) < 220
    assert interpreter("'\\ud800'") == "'\\ud800'"
    assert "died" in interpreter("import os\nos._exit(1)")
    assert interpreter("y").startswith("(a new interpreter")


class Scripted(Conversation):
    """A conversation whose model says what it is told to."""

    def __init__(self, answers, interpreter):
        self._answers = iter(answers)
        super().__init__(None, None, Sampling(), 8, 0, interpreter=interpreter)

    def _answer(self, show):
        answer = next(self._answers)
        call = {"tool": "interpreter", "content": answer[4:]} if answer.startswith("run ") else None
        message = {"role": "assistant", "content": "" if call else answer}
        self.messages.append(message | ({"tool_call": call} if call else {}))
        self.turn = "interpreter" if call else "user"


def test_a_conversation_goes_on_with_the_result(interpreter):
    talk = Scripted(["run a = 20", "run a + 1", "It is 21."], interpreter)
    assert talk.messages[0]["name"] == "interpreter"
    shown = []
    talk.say("What is 20 + 1?", shown.append)
    roles = [(m["role"], m.get("content")) for m in talk.messages[1:]]
    assert roles == [
        ("user", "What is 20 + 1?"), ("assistant", ""), ("environment", "(no output)"),
        ("assistant", ""), ("environment", "21"), ("assistant", "It is 21."),
    ]  # fmt: skip
    assert "[result] 21\n" in shown and talk.turn == "user"


def test_calls_without_end_come_back_to_the_person(interpreter):
    talk = Scripted(["run 1"] * 99, interpreter)
    talk.say("Go on.", lambda text: None)
    assert sum(m["role"] == "environment" for m in talk.messages) == MOST_CALLS
    assert talk.turn == "interpreter"


def test_without_the_sandbox_the_person_answers():
    talk = Scripted(["run 1"], None)
    talk.say("Go on.", lambda text: None)
    assert talk.turn == "interpreter" and talk.messages[-1]["role"] == "assistant"


def test_it_is_refused_where_nothing_isolates(monkeypatch):
    monkeypatch.setattr("internlm2_jax.sandbox.jail.SEARCH", "/nowhere")
    from internlm2_jax.sandbox import require

    require.cache_clear()
    with pytest.raises(UserError, match="bwrap is not installed"):
        Interpreter()
