"""Sessions keep state, can be interrupted, and say what came of a run."""

from __future__ import annotations

import dataclasses
import os
import threading
import time

import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.sandbox import Jail, Limits, Program, SandboxError, Session, run_many
from internlm2_jax.sandbox.session import require
from internlm2_jax.sandbox.worker import decode, encode


def test_state_survives_from_run_to_run(session):
    assert session.run("x = 6", timeout=20).shown is None
    assert session.run("x * 7", timeout=20).shown == "42"
    error = session.run("def f():\n    return 1 / 0\nf()", timeout=20)
    assert error.status == "error"
    assert error.error.startswith("Traceback") and "return 1 / 0" in error.error
    assert "worker" not in error.error
    assert session.run("f.__name__, x", timeout=20).shown == "('f', 6)"
    assert session.run("x", timeout=20, fresh=True).status == "error"


def test_output_belongs_to_its_run_and_is_cut(session):
    result = session.run("import sys\nprint('a')\nprint('b', file=sys.stderr)", timeout=20)
    assert sorted(result.output.split()) == ["a", "b"]
    result = session.run("print('é' * 100_000)", timeout=20)
    assert len(result.output.encode()) <= 20_000 and result.dropped == 200_001 - 20_000
    assert session.run("print('c')", timeout=20).output == "c\n"


def test_standard_input(session):
    code = "import sys\nfirst = input()\nrest = sys.stdin.read()\nfirst, rest"
    assert session.run(code, stdin="1\n2\n3", timeout=20).shown == "('1', '2\\n3')"


def test_a_late_run_is_interrupted_and_state_survives(session):
    session.run("x = 1", timeout=20)
    result = session.run("import time\nx = 2\ntime.sleep(60)", timeout=0.3)
    assert result.status == "timeout" and session.alive and result.seconds < 20
    assert session.run("x", timeout=20).shown == "2"


def test_interrupt_from_another_thread(session):
    threading.Timer(0.3, session.interrupt).start()
    result = session.run("import time\ntime.sleep(60)", timeout=50)
    assert result.status == "interrupted" and result.seconds < 20
    assert session.run("1", timeout=20).status == "ok"


def test_an_interrupt_of_nothing_is_nothing(session):
    session.interrupt()
    assert session.run("sum(range(1000))", timeout=20).shown == "499500"


def test_calls_cross_the_border_as_plain_data(session):
    session.run(
        "def f(a, b=()):\n    a.append(9)\n    return {'a': a, 'b': b, 'x': float('inf')}\n"
        "class Solution:\n    def twice(self, n): return 2 * n\n"
        "def g(): return object()",
        timeout=20,
    )
    result = session.call("f", [[1]], {"b": (b"\x00", {2})}, timeout=20)
    assert result.value == {"a": [1, 9], "b": (b"\x00", {2}), "x": float("inf")}
    assert result.args == [[1, 9]]
    assert session.call("Solution.twice", [4], {}, timeout=20).value == 8
    assert "not plain data" in session.call("g", [], {}, timeout=20).error
    assert session.call("nowhere", [], {}, timeout=20).status == "error"


def test_calls_out_of_the_sandbox(session):
    def answer(name, args, keywords):
        if name == "bad":
            return {"kind": "ValueError", "error": "no"}
        args[0].sort()
        return {"value": len(args[0]), "args": args}

    code = """
row = [3, 1, 2]
n = count(row)
try: bad()
except ValueError as error: said = str(error)
n, row, said
"""
    result = session.run(code, remote=["count", "bad"], answer=answer, timeout=20)
    assert result.shown == "(3, [1, 2, 3], 'no')"


@pytest.mark.parametrize(
    "value", [None, True, 1, -(10**30), 0.1, float("-inf"), 1j, "é\ud800", b"\xff", [], (1, [2]),
              {3}, frozenset({4}), {1: {"a": ()}}, [True, 1, 1.0]],
)  # fmt: skip
def test_plain_data_survives(value):
    back = decode(encode(value))
    assert back == value and type(back) is type(value)
    assert repr(back) == repr(value)


def test_what_is_not_plain_data_is_refused():
    class Number(int):
        pass

    for value in (Number(1), object(), [Number(1)], len, {1: Number(2)}):
        with pytest.raises(TypeError, match="not plain data"):
            encode(value)


def test_packages_can_be_lent(isolates, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "lent.py").write_text("NUMBER = 7")
    with Session(Jail(packages=(tmp_path,))) as session:
        assert session.run("import lent\nlent.NUMBER", timeout=20).shown == "7"
        wrote = session.run(f"open({str(tmp_path / 'lent.py')!r}, 'w')", timeout=20)
    assert "Read-only" in wrote.error and (tmp_path / "lent.py").read_text() == "NUMBER = 7"


def test_a_closed_session_says_so(jail):
    session = Session(jail)
    session.close()
    session.close()
    assert not session.alive
    with pytest.raises(UserError, match="has ended"):
        session.run("1", timeout=1)


def test_a_session_outlives_the_thread_that_made_it(jail):
    made = []
    thread = threading.Thread(target=lambda: made.append(Session(jail)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    with made[0] as session:
        assert session.run("1 + 1", timeout=20).shown == "2"


def test_a_batch_tells_results_apart(jail):
    programs = [
        Program("print(int(input()) + 1)", "41"),
        Program("1 / 0"),
        Program("while True: pass", timeout=0.3),
        Program("import os; print('all well', flush=True); os._exit(0)"),
        Program("import sys; sys.exit(3)"),
    ]
    ended = []
    results = run_many(programs, jail=jail, workers=2, ended=lambda: ended.append(1))
    assert [r.status for r in results] == ["ok", "error", "timeout", "died", "exit"]
    assert results[0].output == "42\n" and results[3].code == 0 and results[4].code == 3
    assert len(ended) == len(programs)


def test_a_failing_machine_is_no_failing_program(jail, monkeypatch):
    require(jail)
    real, starts = Jail.start, []

    def start(self):
        starts.append(1)
        if len(starts) == 2:
            raise SandboxError("out of memory, say")
        return real(self)

    monkeypatch.setattr(Jail, "start", start)
    results = run_many([Program("1")] * 3, jail=jail, workers=1)
    assert [r.status for r in results] == ["ok", "infrastructure", "ok"]
    assert "out of memory" in results[1].error


def test_a_program_finds_low_descriptors_whatever_is_open_outside(jail):
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(80)]
    try:
        with Session(jail) as session:
            shown = session.run("import os\nmax(map(int, os.listdir('/proc/self/fd')))", timeout=20)
    finally:
        for fd in held:
            os.close(fd)
    assert 3 <= int(shown.shown) < 8, shown


def test_limits_are_checked():
    with pytest.raises(UserError, match="processes is 2"):
        Limits(processes=2)
    with pytest.raises(UserError, match="memory"):
        dataclasses.replace(Limits(), memory=1)
