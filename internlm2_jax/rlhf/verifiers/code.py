"""Programs against unit tests, in the sandbox, in a way that no program can forge.

A program never learns whether it has passed, and never holds what it is compared with:

    stdio   it gets standard input; its output is compared out here.
    calls   it gets a function's arguments; what comes back is compared out here.
    tests   test code runs in a second sandbox, where the program's functions are stand-ins whose
            calls cross over as plain data. A test that ends without an error has passed.

So leaving early with status 0, writing to whatever is open, or an object that equals everything is
worth nothing. The price: arguments and results must be plain data.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.verifiers.verdict import Verdict, passed
from internlm2_jax.sandbox import Jail, Result, SandboxError, Session, require
from internlm2_jax.sandbox.pool import parallel

_FENCE = re.compile(r"```(?:python|py)?[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
Score = Literal["all", "share"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a program is tried with.

    Attributes:
      stdio: (standard input, expected output).
      calls: (function, arguments, expected result); "Class.method" makes a Class() first.
      tests: test code, each in turn in one namespace; `setup` comes before.
      functions: the program's functions that `tests` call.
      timeout: seconds of wall time of the program and of each test.
    """

    stdio: Sequence[tuple[str, str]] = ()
    calls: Sequence[tuple[str, Sequence[Any], Any]] = ()
    tests: Sequence[str] = ()
    functions: Sequence[str] = ()
    setup: str = ""
    timeout: float = 5.0

    def __post_init__(self) -> None:
        if not (self.stdio or self.calls or self.tests):
            raise UserError("a code problem has no stdio, no calls and no tests; it needs some")
        if self.tests and not self.functions:
            raise UserError("a code problem's tests call no function: name some in `functions`")

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Problem:
        """From JSON. Errors: UserError that names an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(row) - known:
            raise UserError(
                f"a code problem has no field {sorted(unknown)[0]!r}; it has {', '.join(known)}"
            )
        return cls(**row)


class Code:
    """Verdicts of programs; `workers` (default: processor cores) at a time.

    score: "all" is 1 for a program that passes every test; "share" is the share that it passes.
    """

    def __init__(
        self, *, jail: Jail | None = None, workers: int | None = None, score: Score = "all"
    ) -> None:
        self._jail, self._workers, self._score = jail, workers, score

    def __call__(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        """Errors: UserError where this machine cannot isolate; nothing has run then."""
        require(self._jail)
        work = list(zip(map(program_of, responses), problems, strict=True))
        return list(parallel(lambda item: self._verdict(*item), work, workers=self._workers))

    def _verdict(self, program: str, problem: Problem) -> Verdict:
        trial = _Trial(program, problem, self._jail)
        try:
            right, total = trial.stdio()
            for kind in (trial.calls, trial.tests):
                more = kind()
                right, total = right + more[0], total + more[1]
        except (SandboxError, OSError) as error:
            return Verdict("infrastructure", str(error)[:200])
        finally:
            trial.close()
        if right == total:
            return passed(f"{total} of {total} tests")
        share = right / total if self._score == "share" else 0.0
        detail = f"{right} of {total} tests; {trial.why}"
        return Verdict("timeout" if trial.late else "fail", detail[:300], share)


def program_of(response: str) -> str:
    """The last fenced block of a response, or all of it."""
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else response


class _Trial:
    """One program and its tests. `late`: something took too long; `why`: the first thing wrong."""

    def __init__(self, program: str, problem: Problem, jail: Jail | None) -> None:
        self._program, self._problem, self._jail = program, problem, jail
        self._session: Session | None = None
        self._loaded: Result | None = None
        self.late, self.why = False, ""

    def close(self) -> None:
        if self._session:
            self._session.close()

    def stdio(self) -> tuple[int, int]:
        right = 0
        for given, expected in self._problem.stdio:
            result = self._fresh().run(
                self._program, stdin=given, fresh=True, timeout=self._problem.timeout
            )
            well = result.status == "ok" or (result.status in ("exit", "died") and not result.code)
            if well and not result.dropped and same_output(result.output, expected):
                right += 1
            else:
                self._blame(result, f"printed {result.output[-60:]!r}, not {expected[-60:]!r}")
        self.close()
        return right, len(self._problem.stdio)

    def calls(self) -> tuple[int, int]:
        right = 0
        for name, args, expected in self._problem.calls:
            result = self._called(name, args, {})
            if result.status == "ok" and same(result.value, expected):
                right += 1
            else:
                self._blame(result, f"{name} gave {result.value!r:.60}, not {expected!r:.60}")
        return right, len(self._problem.calls)

    def tests(self) -> tuple[int, int]:
        if not self._problem.tests:
            return 0, 0
        right = 0
        names = list(self._problem.functions)
        with Session(self._jail) as tester:
            setup = tester.run(self._problem.setup, timeout=30)
            if setup.status != "ok":
                raise SandboxError(f"the setup of the tests fails: {_last_line(setup.error)}")
            for test in self._problem.tests:
                # Time in the program is counted by its own calls.
                result = tester.run(
                    test, remote=names, answer=self._answer, timeout=2 * self._problem.timeout
                )
                if result.status == "died":
                    raise SandboxError(f"the tests' own sandbox ended: {result.error}")
                if result.status == "ok":
                    right += 1
                else:
                    self._blame(result, _last_line(result.error))
                if not tester.alive:  # what it was given keeps it busy
                    break
        return right, len(self._problem.tests)

    def _answer(self, name: str, args: list[Any], keywords: dict[str, Any]) -> dict[str, Any]:
        result = self._called(name, args, keywords)
        if result.status == "ok":
            return {"value": result.value, "args": result.args}
        self._blame(result, _last_line(result.error))
        kind = _last_line(result.error).partition(":")[0]
        return {"kind": kind, "error": _last_line(result.error).partition(": ")[2]}

    def _called(self, name: str, args: Sequence[Any], keywords: Mapping[str, Any]) -> Result:
        """A call of the program's function; the program is loaded again if it has died."""
        session = self._fresh()
        if self._loaded is None:
            self._loaded = session.run(self._program, fresh=True, timeout=self._problem.timeout)
        if self._loaded.status != "ok":
            return self._loaded
        return session.call(name, args, keywords, timeout=self._problem.timeout)

    def _fresh(self) -> Session:
        if self._session is None or not self._session.alive:
            end = time.monotonic() + 1
            while True:
                try:
                    self._session, self._loaded = Session(self._jail), None
                    break
                except SandboxError:  # a machine may be short of something for a moment
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.1)
        return self._session

    def _blame(self, result: Result, wrong: str) -> None:
        self.late = self.late or result.status == "timeout"
        if not self.why:
            bad = result.status != "ok"
            self.why = f"{result.status}: {_last_line(result.error)}" if bad else wrong


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200] if text.strip() else ""


def same_output(output: str, expected: str) -> bool:
    """Equal but for white space at the ends of lines and of the whole."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.strip().splitlines()]

    return lines(output) == lines(expected)


def same(value: Any, expected: Any) -> bool:
    """Equal, with 1e-9 of tolerance for floats and JSON's lists for tuples."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) or isinstance(expected, float):
        try:
            return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12) or (
                math.isnan(value) and math.isnan(expected)
            )
        except TypeError:
            return False
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same(value[k], expected[k]) for k in value)
    return type(value) is type(expected) and value == expected
