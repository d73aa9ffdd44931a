"""The interpreter calls of a model, run in the sandbox: `internlm2 chat --interpreter`.

One session lasts for a conversation, so that a later call sees what an earlier one has defined.
"""

from __future__ import annotations

import re

from internlm2_jax.sandbox import Jail, Result, SandboxError, Session, require

SYSTEM = (
    "You can run Python: a call holds one fenced code block, and what it prints and the value of "
    "its last line are answered. State is kept. There is no network, and only /tmp can be written."
)
_FENCE = re.compile(r"\A\s*```[^\n]*\n(.*?)(?:\n```\s*|```\s*)?\Z", re.DOTALL)


class Interpreter:
    """Errors: UserError where this machine cannot isolate, when it is made."""

    def __init__(self, *, jail: Jail | None = None, timeout: float = 30.0, longest: int = 4000):
        require(jail)
        self._jail, self._timeout, self._longest = jail, timeout, longest
        self._session: Session | None = None

    def __call__(self, call: str) -> str:
        """What the model is told of a call: output, value and error, cut in the middle."""
        match = _FENCE.match(call)
        code = match.group(1) if match else call
        fresh = self._session is not None and not self._session.alive
        try:
            if self._session is None or fresh:
                self._session = Session(self._jail)
            text = _told(self._session.run(code, timeout=self._timeout), self._timeout)
        except SandboxError as error:
            text = f"The interpreter has failed: {error}"
        if fresh:
            text = f"(a new interpreter: what was defined before is gone)\n{text}"
        return self._clip(text.encode("utf-8", "replace").decode())

    def close(self) -> None:
        """Ends the session; the next call begins another."""
        if self._session:
            self._session.close()
        self._session = None

    def _clip(self, text: str) -> str:
        half = self._longest // 2
        return text if len(text) <= self._longest else f"{text[:half]}\n...\n{text[-half:]}"


def _told(result: Result, timeout: float) -> str:
    parts = [result.output.rstrip("\n")] if result.output.strip() else []
    if result.dropped:
        parts.append(f"(and {result.dropped:,} bytes more)")
    if result.status == "ok":
        parts += [result.shown] if result.shown is not None else []
        return "\n".join(parts) or "(no output)"
    why = {
        "timeout": f"Stopped after {timeout:g} s.",
        "died": f"The interpreter died: {result.error}.",
        "interrupted": "Interrupted.",
    }
    return "\n".join([*parts, why.get(result.status, result.error.rstrip())])
