"""The text of a response while it grows: whole characters, and stop strings that never show."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError


class TextStream:
    """Turns ids into text piece by piece.

    What `push` and `finish` return, joined, is `Tokenizer.decode` of the ids, up to the first stop
    string. Characters that are not whole yet, and an ending that may become a stop string, wait.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise UserError("a stop string is empty; it would end every response at once")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that `token` makes certain. Sets `stopped` when a stop string is complete."""
        return self._sift(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """The rest, when no token follows."""
        text = self._sift(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _sift(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for at in map(text.find, self._stops) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        wait = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - wait :]
        return text[: len(text) - wait]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
