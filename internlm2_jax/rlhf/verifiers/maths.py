"""Answers to mathematical problems: a strict check, and math-verify where that says no.

math-verify reads LaTeX into sympy and so knows that \\frac{1}{2} is 0.5 and that (x+1)^2 is
x^2+2x+1. It can hang, and it can take all memory: it runs in processes of its own that are ended
when they are late. It also errs: an equation with nothing alone on its left is compared as 0 = 0
and two boxes are one set, so it is given the last box alone, and no such equation.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import resource
from collections.abc import Sequence
from typing import Any, Literal

import pebble

from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.verifiers import strict
from internlm2_jax.rlhf.verifiers.verdict import Verdict, failed, passed

Accept = Literal["either", "strict"]
MEMORY = 2**31  # bytes of address space of a worker
LONGEST = 1000  # letters of an answer that math-verify is asked about
_ASSIGNMENT = re.compile(r"\s*\\?[A-Za-z]+(?:_\{?\w+\}?)?\s*=[^=]*")


class Maths:
    """Checks answers in `workers` processes that begin when first needed.

    accept: "either" takes what one of the two checkers takes; "strict" asks math-verify nothing.
    timeout: seconds of one comparison.
    """

    def __init__(
        self, *, workers: int | None = None, timeout: float = 5.0, accept: Accept = "either"
    ) -> None:
        if accept not in ("either", "strict"):
            raise UserError(f"maths verifier: accept={accept!r} is neither 'either' nor 'strict'")
        if accept == "either":
            needs_math_verify()
        self._workers, self._timeout, self._accept = workers or os.cpu_count(), timeout, accept
        self._pool: pebble.ProcessPool | None = None

    def __call__(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """A verdict of each response against its right answer, both as text."""
        pairs = [(strict.final_answer(r), g) for r, g in zip(responses, golds, strict=True)]
        verdicts: dict[int, Verdict] = {}
        asked: dict[int, Any] = {}
        for i, (answer, gold) in enumerate(pairs):
            if strict.equal(answer, gold):
                verdicts[i] = passed("equal")
            elif self._accept == "strict" or not _askable(answer, gold):
                verdicts[i] = failed(f"{_short(answer)} is not {_short(gold)}")
            else:
                asked[i] = self._ask(answer, gold)
        for i, future in asked.items():
            verdicts[i] = self._judge(future, *pairs[i])
        return [verdicts[i] for i in range(len(pairs))]

    def close(self) -> None:
        """Ends the processes."""
        if self._pool:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def __enter__(self) -> Maths:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, answer: str, gold: str) -> Any:
        if self._pool is None:
            self._pool = pebble.ProcessPool(
                self._workers or 1,
                initializer=_prepare,
                context=multiprocessing.get_context("spawn"),  # jax has threads: no fork
            )
        return self._pool.schedule(_compare, args=(answer, gold), timeout=self._timeout)

    def _judge(self, future: Any, answer: str, gold: str, again: bool = True) -> Verdict:
        said = f"{_short(answer)} against {_short(gold)}"
        try:
            same = future.result()
        except concurrent.futures.TimeoutError:
            return Verdict("timeout", f"math-verify took over {self._timeout:g} s for {said}")
        except pebble.ProcessExpired as error:
            # A worker that dies once may have been anybody's fault, twice is the answer's.
            if again:
                return self._judge(self._ask(answer, gold), answer, gold, again=False)
            return failed(f"math-verify died of {said} ({error})")
        except MemoryError:
            return failed(f"math-verify had not memory enough for {said}")
        except Exception as error:
            return Verdict("infrastructure", f"{type(error).__name__}: {error}"[:200])
        return passed(said, disputed=True) if same else failed(said)


def _askable(answer: str, gold: str) -> bool:
    if not answer or len(answer) > LONGEST:
        return False
    return all("=" not in text or _ASSIGNMENT.fullmatch(text) for text in (answer, gold))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 40 else text[:40] + "...")


def needs_math_verify() -> None:
    """Errors: UserError where it is not installed."""
    import importlib.util

    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "checking mathematics needs math-verify: pip install 'internlm2-jax[verify]', or set "
            "accept to 'strict'"
        )


# ---------------------------------------------------------------------------- in the workers
def _prepare() -> None:
    import logging

    import math_verify  # noqa: F401  imports sympy: a second that no answer is charged for

    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _compare("\\frac{1}{2}", "0.5")


def _compare(answer: str, gold: str) -> bool:
    """math-verify's word on two final answers; the time limits are the pool's."""
    import math_verify

    def read(text: str) -> Any:
        return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)

    try:
        return bool(
            math_verify.verify(read(gold), read(answer), timeout_seconds=None, raise_on_error=True)
        )
    except MemoryError:
        raise
    except Exception:  # what cannot be read is not the right answer
        return False
