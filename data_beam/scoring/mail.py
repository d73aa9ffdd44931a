"""Labelled texts for a classifier of advertisements, from mail that people have sorted.

The layout is that of the SpamAssassin public corpus: one message a file, in folders whose names say
what is in them ("spam-1", "easy-ham-2"; also "spam", "easy_ham"). Its "hard ham" is left out: bulk
mail that somebody asked for, most of it advertisements too.
"""

from __future__ import annotations

import email
import email.policy
import os
import re
from collections.abc import Iterator
from email.message import EmailMessage, MIMEPart
from pathlib import Path
from typing import Any

from data_beam.io.extract.page import PageError, main_text
from internlm2_jax.errors import UserError

_SPAM = re.compile(r"(?:^|[-_/])spam", re.IGNORECASE)
_HAM = re.compile(r"(?:^|[-_/])(?:easy[-_])?ham", re.IGNORECASE)
_HARD = re.compile(r"hard[-_]?ham", re.IGNORECASE)
_ANSWER = re.compile(r"^(?:\s*(?:re|fwd?|aw)\s*(?:\[\d+\])?:|\s*\[[^\]]{1,40}\])+", re.IGNORECASE)
_SHORTEST = 80  # characters of a body worth judging


def advertisements(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Rows {"text": subject and body, "label": 1 = spam, "group": the subject}, in the order of the
    paths, each body once; subjects are without Re: and the names of lists. Messages without a body
    that can be read are left out. Raises UserError when the folder holds no mail of both kinds."""
    seen: set[str] = set()
    found = [0, 0]
    for path in sorted(Path(folder).rglob("*")):
        label = _label(path.relative_to(folder).parent.as_posix())
        if label is None or path.suffix == ".json" or not path.is_file():
            continue
        subject, body = read(path.read_bytes())
        if len(body) < _SHORTEST or body in seen:
            continue
        seen.add(body)
        found[label] += 1
        subject = _ANSWER.sub("", subject).strip()  # "Re: [list]" would tell ham without reading
        group = subject.casefold() or body[:200]
        yield {"text": f"{subject}\n\n{body}".strip(), "label": label, "group": group}
    if not all(found):
        raise UserError(
            f"{folder} has {found[1]} messages in spam folders and {found[0]} in ham folders; both "
            "are needed, one message a file, as in the SpamAssassin public corpus"
        )


def _label(folder: str) -> int | None:
    if _HARD.search(folder):
        return None
    return 1 if _SPAM.search(folder) else 0 if _HAM.search(folder) else None


def read(data: bytes) -> tuple[str, str]:
    """(subject, text of the body) of a message; HTML becomes plain text."""
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    try:
        subject = " ".join(str(message["subject"] or "").split())
    except (ValueError, LookupError, IndexError, AttributeError):  # headers that Python gives up on
        subject = ""
    try:
        part = message.get_body(("plain", "html"))
    except (KeyError, AttributeError):
        part = None
    return subject, _text(part) if part is not None else ""


def _text(part: MIMEPart) -> str:
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    if part.get_content_subtype() == "html":
        try:
            return main_text(content, method="resiliparse")[0].strip()
        except PageError:
            return ""
    charset = part.get_content_charset() or "utf-8"
    try:
        return content.decode(charset, "replace").replace("\r\n", "\n").strip()
    except LookupError:  # a character set that nobody knows
        return content.decode("latin-1").replace("\r\n", "\n").strip()
