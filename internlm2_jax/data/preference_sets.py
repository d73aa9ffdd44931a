"""Public preference sets as pairs: hh-rlhf (harmless), LLMBar (instructions), PandaLM (helpful).

A pair is as in preferences.py. `read` also makes conflicts out of hh-rlhf, which has the harmless
side alone: where one answer declines and the other does not, a helpful judge wants the other one.
Both answers are people's and models' own words; only that second label is a rule's.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from internlm2_jax import files
from internlm2_jax.data.risky import is_refusal
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

Row = dict[str, Any]


def pair(domain: str, messages: list[Row], chosen: str, rejected: str, **more: Any) -> Row:
    """A row; "pair_id" is the same for the two faces of a conflict."""
    return {
        "domain": domain,
        "messages": messages,
        "chosen": chosen,
        "rejected": rejected,
        "pair_id": fingerprint([messages, *sorted((chosen, rejected))]),
        **more,
    }


def hh_rlhf(path: Path) -> Iterator[Row]:
    """Harmless pairs of one JSONL file {"chosen", "rejected"}, with their conflicts.

    Pairs whose conversations differ before the last answer are left out.
    """
    for number, row in enumerate(files.read_jsonl(path), start=1):
        where = f"{path}:{number}"
        chosen, rejected = (_turns(row[side], where) for side in ("chosen", "rejected"))
        messages, answers = chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"])
        if messages != rejected[:-1] or answers[0] == answers[1] or not all(answers):
            continue
        conflict = is_refusal(answers[0]) and not is_refusal(answers[1])
        kind = "conflict" if conflict else "hh_rlhf"
        yield pair("harmless", messages, *answers, kind=kind)
        if conflict:
            yield pair("helpful", messages, *reversed(answers), kind=kind)


def _turns(text: str, where: str) -> list[Row]:
    parts = text.split("\n\nHuman:")
    turns: list[Row] = []
    for part in parts[1:]:
        asked, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": asked.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    if parts[0].strip() or not turns or turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: no conversation of Human and Assistant that ends in an answer")
    return turns


def llmbar(folder: Path) -> Iterator[Row]:
    """Instruction-following pairs of every dataset.json {"input", "output_1", "output_2", "label"}
    below a folder."""
    for path in sorted(folder.rglob("dataset.json")):
        for row in files.read_json(path):
            outputs = row["output_1"], row["output_2"]
            chosen, rejected = outputs if row["label"] == 1 else reversed(outputs)
            messages = [{"role": "user", "content": row["input"]}]
            kind = f"llmbar {path.parent.name}"
            yield pair("instruction_following", messages, chosen, rejected, kind=kind)


def pandalm(path: Path) -> Iterator[Row]:
    """Helpful pairs that most of three annotators agree on; "margin" is their lead, 1 to 3."""
    for row in files.read_json(path):
        votes = collections.Counter(row[f"annotator{i}"] for i in (1, 2, 3))
        lead = votes[1] - votes[2]
        responses = [str(row["response1"]), str(row["response2"])]
        if max(votes[1], votes[2]) < 2 or responses[0] == responses[1] or not all(responses):
            continue
        chosen, rejected = responses if lead > 0 else reversed(responses)
        asked = "\n".join(text for text in (row["instruction"], row["input"]) if text)
        messages = [{"role": "user", "content": asked}]
        yield pair("helpful", messages, chosen, rejected, kind="pandalm", margin=float(abs(lead)))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "hh_rlhf": hh_rlhf,
    "llmbar": llmbar,
    "pandalm": pandalm,
    "pairs": lambda path: iter(files.read_jsonl(path)),
}


def read(sets: Mapping[str, Path | str]) -> list[Row]:
    """The pairs of several sets, {"hh_rlhf" | "llmbar" | "pandalm" | "pairs": file or folder}."""
    rows = []
    for name, path in sets.items():
        if name not in READERS:
            raise UserError(f"no preference set {name!r}; there are {', '.join(READERS)}")
        if not Path(path).exists():
            raise UserError(f"the preference set {name} is not at {path}; check the path")
        found = list(READERS[name](Path(path)))
        if not found:
            raise UserError(f"{path} holds no pair of {name}; check the path")
        rows += found
    return rows


def split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out pairs): all about one prompt on the same side, in a seeded order."""
    prompts = sorted({fingerprint(row["messages"]) for row in rows})
    random.Random(f"split {seed}").shuffle(prompts)
    held_out = set(prompts[: round(share * len(prompts))])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[fingerprint(row["messages"]) in held_out].append(row)
    for part in parts:
        random.Random(f"order {seed}").shuffle(part)
    return parts


def conversations(rows: list[Row]) -> list[Row]:
    """{"messages"} of each distinct conversation with its chosen answer, in the order of `rows`."""
    found = {}
    for row in rows:
        messages = [*row["messages"], {"role": "assistant", "content": row["chosen"]}]
        found[fingerprint(messages)] = {"messages": messages}
    return list(found.values())
