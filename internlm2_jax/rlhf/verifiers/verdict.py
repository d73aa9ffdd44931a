"""What a verifier says of a response: right, wrong, too slow, or that it could not be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

Outcome = Literal["pass", "fail", "timeout", "infrastructure"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Attributes:
    outcome: "infrastructure" says that the machine failed: nothing is known of the response.
    detail: one line of why.
    score: 1 for a pass, 0 for a fail; a share of tests in between, where that was asked for.
    disputed: two checkers did not agree.
    """

    outcome: Outcome
    detail: str = ""
    score: float = 0.0
    disputed: bool = False

    @property
    def reward(self) -> float | None:
        """None for what must be masked and not scored."""
        return None if self.outcome == "infrastructure" else self.score


def passed(detail: str = "", *, disputed: bool = False) -> Verdict:
    return Verdict("pass", detail, 1.0, disputed)


def failed(detail: str = "", *, disputed: bool = False) -> Verdict:
    return Verdict("fail", detail, 0.0, disputed)
