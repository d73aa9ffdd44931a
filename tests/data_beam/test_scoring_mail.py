"""Sorted mail becomes labelled texts: what a message says, whatever it is wrapped in."""

from __future__ import annotations

from email.message import EmailMessage

import pytest

from data_beam.scoring import mail
from internlm2_jax.errors import UserError

BODY = "We meet on Thursday at the usual place; bring the minutes of the last time, please. "
OFFER = "Order now and save 50% on everything in the shop, this week only, free delivery. "


def write(folder, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def message(subject: str, text: str, html: str | None = None, **options: str) -> bytes:
    found = EmailMessage()
    found["Subject"] = subject
    found["Received"] = "from a host that no classifier should see"
    found.set_content(text, **options)
    if html is not None:
        found.add_alternative(html, subtype="html")
    return found.as_bytes()


@pytest.fixture
def folder(tmp_path):
    ham, spam = tmp_path / "easy_ham", tmp_path / "spam-2"
    write(ham, "1", message("Re: [club] Re: Thursday", BODY + "Grüße", charset="latin-1"))
    write(ham, "2", message("Thursday", BODY + "\nShall do.", f"<p>{OFFER}</p>"))
    write(ham, "3", message("Again", BODY + "Grüße", charset="latin-1"))  # the first one's body
    write(ham, "4", message("Short", "ok"))
    write(ham, "5", b"Subject: none\nContent-Type: image/png\n\n\x89PNG")
    write(spam, "1", message("OFFER", OFFER, cte="base64"))
    page = EmailMessage()
    page["Subject"] = "[club] Offer"
    page.set_content(f"<html><body><p>{OFFER}</p><p>{OFFER[::-1]}</p></body></html>", "html")
    write(spam, "2", page.as_bytes())
    write(
        spam, "3", f"Content-Type: text/plain; charset=no-such\n\n{OFFER} caf\xe9".encode("latin-1")
    )
    write(spam, "2.json", b'{"text": "of the same message"}')
    write(tmp_path / "hard-ham-1", "1", message("Your newsletter", OFFER + BODY))
    return tmp_path


def test_rows(folder):
    rows = list(mail.advertisements(folder))
    assert [(row["group"], row["label"]) for row in rows] == [
        ("thursday", 0), ("thursday", 0), ("offer", 1), ("offer", 1), (rows[-1]["text"][:200], 1)
    ]  # fmt: skip
    texts = [row["text"] for row in rows]
    assert texts[0] == f"Thursday\n\n{BODY}Grüße"
    assert OFFER.strip() not in texts[1] and texts[2] == f"OFFER\n\n{OFFER.strip()}"
    assert texts[3].startswith(f"Offer\n\n{OFFER.strip()}") and "<" not in texts[3]
    assert texts[4] == f"{OFFER} café"
    assert not any("no classifier should see" in text for text in texts)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_mail_does_not_stop_the_job(folder, seed, tmp_path):
    import random

    rng = random.Random(seed)
    originals = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    for number in range(300):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        write(folder / "spam-3", str(number), bytes(data[rng.randrange(40) :]))
    assert all(isinstance(row["text"], str) for row in mail.advertisements(folder))


def test_one_kind_is_an_error(tmp_path):
    write(tmp_path / "spam", "1", message("OFFER", OFFER))
    with pytest.raises(UserError, match="1 messages in spam folders and 0 in ham folders"):
        list(mail.advertisements(tmp_path))
