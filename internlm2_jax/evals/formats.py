"""Readers, one for each format: rows of files in, items out (items.py)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm2_jax.evals.items import BadRow, Fields, Item, Reader
from internlm2_jax.rlhf.verifiers import strict

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABEL = re.compile(r"\s*\(?([A-Z])[).:：、．]\s*")


# ------------------------------------------------------------------------------ choices


def choices(f: Fields) -> Iterator[Item]:
    """MMLU, CMMLU, C-Eval, AGIEval and their like: a question, its choices, the right one.

    The answer is a letter, an index from 0, the text of a choice, or a list of letters.
    """
    texts = _texts(f.need("choices", list))
    right = _right(f.need("answer"), texts)
    yield f.item(
        fields={"question": f.text("question"), "context": f.get("context") or ""},
        choices=texts,
        right=right,
        answers=tuple(LETTERS[i] for i in right),
    )


def reading(f: Fields) -> Iterator[Item]:
    """RACE: an article with questions, options and answers, lists of one length."""
    article, questions = f.text("article"), f.need("questions", list)
    options, answers = f.need("options", list), f.need("answers", list)
    if not len(questions) == len(options) == len(answers):
        raise BadRow(
            f"has {len(questions)} questions, {len(options)} lists of options and "
            f"{len(answers)} answers"
        )
    for i, (question, texts, answer) in enumerate(zip(questions, options, answers, strict=True)):
        texts = _texts(texts)
        right = _right(answer, texts)
        yield f.item(
            f"/{i}",
            fields={"question": question, "context": article},
            choices=texts, right=right, answers=tuple(LETTERS[i] for i in right),
        )  # fmt: skip


def c3(f: Fields) -> Iterator[Item]:
    """C3: [lines of a text or dialogue, [{"question", "choice", "answer"}], id]."""
    lines, questions, identity = f.need("lines", list), f.need("questions", list), f.text("id")
    for i, asked in enumerate(questions):
        if missing := {"question", "choice", "answer"} - set(asked):
            raise BadRow(f"has no {min(missing)!r} in its question {i + 1}")
        texts = _texts(asked["choice"])
        right = _right(asked["answer"], texts, by_text=True)
        yield Item(
            f"{identity}/{i}", f.row.where, f.row.group,
            {"question": asked["question"], "context": "\n".join(lines)},
            tuple(LETTERS[i] for i in right), texts, right,
        )  # fmt: skip


def _texts(given: Any) -> tuple[str, ...]:
    """Choices without the letters that some data sets write before them."""
    if not isinstance(given, (list, tuple)) or len(given) < 2:
        raise BadRow(f"has choices {given!r:.60}; expected a list of two or more")
    if len(given) > len(LETTERS):
        raise BadRow(f"has {len(given)} choices; the most is {len(LETTERS)}")
    texts = [str(text) for text in given]
    labels = [match.group(1) if (match := _LABEL.match(text)) else "" for text in texts]
    if labels == list(LETTERS[: len(texts)]):
        texts = [text[_LABEL.match(text).end() :] for text in texts]  # type: ignore[union-attr]
    return tuple(texts)


def _right(answer: Any, texts: Sequence[str], by_text: bool = False) -> tuple[int, ...]:
    letters = LETTERS[: len(texts)]
    if isinstance(answer, list):
        if not answer:
            raise BadRow("has no answer")
        return tuple(i for part in answer for i in _right(part, texts, by_text))
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(texts):
            raise BadRow(
                f"has answer {answer}, outside its {len(texts)} choices (0 to {len(texts) - 1})"
            )
        return (answer,)
    said = str(answer).strip()
    if said in texts and (by_text or said not in letters):
        return (texts.index(said),)
    if len(said) == 1 and said in letters:
        return (letters.index(said),)
    if said.isdigit() and int(said) < len(texts):
        return (int(said),)
    raise BadRow(f"has answer {said!r:.60}, outside its choices {', '.join(letters)}")


# ------------------------------------------------------------------------------ open answers


def answers(f: Fields) -> Iterator[Item]:
    """TriviaQA, Natural Questions, BBH, TheoremQA, LongBench: a question and its right answers.

    The answer is a text, a number, a list, a list written as text, or TriviaQA's object of aliases.
    """
    given = f.need("answer")
    if isinstance(given, Mapping):
        given = [given.get("value"), *given.get("aliases", [])]
    if isinstance(given, str) and given.startswith("[") and f.get("listed", True):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            given = [given]
    right = given if isinstance(given, list) else [given]
    right = [str(text) for text in right if text is not None and str(text).strip()]
    if not right:
        raise BadRow("has no answer")
    yield f.item(
        fields={"question": f.need("question", str), "context": f.get("context") or ""},
        answers=tuple(dict.fromkeys(right)),
        check={"classes": f.get("classes") or [], "length": f.get("length")},
    )


def l_eval(f: Fields) -> Iterator[Item]:
    """L-Eval: one long input, with a list of instructions and one of outputs."""
    asked, outputs = f.need("instructions", list), f.need("outputs", list)
    if len(asked) != len(outputs):
        raise BadRow(f"has {len(asked)} instructions and {len(outputs)} outputs")
    for i, (question, output) in enumerate(zip(asked, outputs, strict=True)):
        fields = {"question": question, "context": f.text("input")}
        yield f.item(f"/{i}", fields=fields, answers=(str(output),))


def solutions(f: Fields) -> Iterator[Item]:
    """GSM8K (the answer after "####") and MATH (in the last box, or in a field of its own)."""
    solution = f.text("solution")
    answer = f.get("answer")
    if answer is None and "####" in solution:
        solution, _, answer = solution.rpartition("####")
        solution = re.sub(r"<<.*?>>", "", solution).strip()
    elif answer is None:
        if "\\boxed" not in solution and "\\fbox" not in solution:
            raise BadRow("has a solution with neither '####' nor a box, so no final answer")
        answer = strict.final_answer(solution)
    yield f.item(
        fields={"question": f.text("question"), "solution": solution},
        answers=(str(answer).strip(),),
    )


def gaokao(f: Fields) -> Iterator[Item]:
    """GAOKAO-Bench: a question with its options inside, the answer a list of letters or a text."""
    given = f.need("answer")
    right = [str(part) for part in given] if isinstance(given, list) else [str(given)]
    joined = "".join(right)
    by_letters = bool(joined) and set(joined) <= set("ABCDEFG")
    yield f.item(
        f"/{f.get('index', '')}" if f.get("index") is not None else "",
        fields={"question": f.text("question"), "context": ""},
        answers=tuple(right) if not by_letters else (joined,),
        check={"letters": by_letters},
    )


# ------------------------------------------------------------------------------ code


def humaneval(f: Fields) -> Iterator[Item]:
    """HumanEval: the beginning of a program, and `check(candidate)`."""
    prompt, test, name = f.text("prompt"), f.text("test"), f.text("entry_point")
    defined = list(dict.fromkeys([name, *re.findall(r"^def (\w+)", prompt, re.M)]))
    yield f.item(
        fields={"question": prompt, "prompt": prompt},
        answers=(f.get("canonical_solution") or "",),
        check={
            "kind": "code", "tests": [f"{test}\n\ncheck({name})"], "functions": defined,
            "before": prompt, "entry": name,
        },
    )  # fmt: skip


def mbpp(f: Fields) -> Iterator[Item]:
    """MBPP: a task in words, three assertions; the functions they call."""
    code, tests = f.text("code").replace("\r\n", "\n"), f.need("test_list", list)
    defined = re.findall(r"^(?:def|class) (\w+)", code, re.M)
    called = [name for name in dict.fromkeys(defined) if any(name in test for test in tests)]
    if not called:
        raise BadRow("has tests that call no function of its code")
    yield f.item(
        fields={"question": f.text("text"), "tests": "\n".join(tests), "code": code},
        answers=(code,),
        check={
            "kind": "code", "tests": list(tests), "functions": called,
            "setup": f.get("test_setup_code") or "",
        },
    )  # fmt: skip


# ------------------------------------------------------------------------------ instructions, tools


def instructions(f: Fields) -> Iterator[Item]:
    """IFEval: a prompt, the names of rules and their arguments."""
    from internlm2_jax.evals.rules import RULES

    names, given = f.need("instruction_id_list", list), f.need("kwargs", list)
    if len(names) != len(given):
        raise BadRow(f"has {len(names)} instructions and {len(given)} kwargs")
    if unknown := [name for name in names if name not in RULES]:
        raise BadRow(f"has instruction {unknown[0]!r}, which no rule checks")
    rules = [
        [name, {k: v for k, v in kwargs.items() if v is not None}]
        for name, kwargs in zip(names, given, strict=True)
    ]
    yield f.item(fields={"question": f.text("prompt")}, check={"rules": rules})


def conversation(f: Fields) -> Iterator[Item]:
    """MT-Bench: the first turn of a conversation, without a right answer."""
    turns = f.need("turns", list)
    if not turns or not isinstance(turns[0], str):
        raise BadRow("has no first turn")
    yield f.item(fields={"question": turns[0]}, answers=tuple(f.get("reference") or ()))


def calls(f: Fields) -> Iterator[Item]:
    """T-Eval: a conversation, and the call that should follow, as JSON or in a template."""
    said, truth = f.need("origin_prompt", list), f.need("ground_truth", dict)
    if missing := {"action", "args"} - set(truth):
        raise BadRow(f"has no {min(missing)!r} in its ground_truth")
    messages = []
    for turn in said:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise BadRow("has a turn without content in its origin_prompt")
        role = turn.get("role")
        messages.append({"role": role if role in ("user", "assistant") else "system",
                         "content": turn["content"]})  # fmt: skip
    yield f.item(
        messages=tuple(messages),
        answers=(json.dumps(truth, ensure_ascii=False),),
        check={
            "action": truth["action"], "args": truth["args"], "template": f.need("template", dict),
            "style": (f.get("meta_data") or {}).get("response_format", "json"),
        },
    )  # fmt: skip


def notebooks(f: Fields) -> Iterator[Item]:
    """CIBench: a notebook whose text asks and whose code answers; an interpreter session.

    Steps are "exec" (it should run), "num" or "general" (it should print what the notebook has),
    "text" (something like it) or "vis" (a picture, which is not compared).
    """
    kinds = list((f.get("metadata") or {}).get("step_types", []))
    steps: list[dict[str, Any]] = []
    question = ""
    for cell in f.need("cells", list):
        source = "".join(cell.get("source", ""))
        if cell.get("cell_type") == "markdown":
            question = source.strip()
        elif cell.get("cell_type") == "code" and question:
            shown = (cell.get("outputs") or [{}])[-1].get("data", {})
            kind = "vis" if "image/png" in shown else "general" if "text/plain" in shown else "exec"
            kind = kinds[len(steps)] if len(kinds) > len(steps) else kind
            output = "".join(shown.get("text/plain", ""))
            steps.append({"question": question, "code": source, "kind": kind, "output": output})
            question = ""
    if not steps:
        raise BadRow("has no question that is followed by code")
    yield f.item(fields={"question": steps[0]["question"]}, check={"steps": steps})


def pairs(f: Fields) -> Iterator[Item]:
    """LLMBar, PandaLM: an instruction, two answers, and which of them people prefer.

    The label is 1 or 2; of several annotators, the one that most gave. Ties (0) are left out.
    """
    labels = f.need("label")
    labels = labels if isinstance(labels, list) else [labels]
    if bad := [label for label in labels if label not in (0, 1, 2)]:
        raise BadRow(f"has label {bad[0]!r}; it is 1, 2, or 0 for a tie")
    counts = {label: labels.count(label) for label in (1, 2, 0)}
    best = max(counts.values())
    winners = [label for label, count in counts.items() if count == best]
    if winners in ([1], [2]):
        asked = [f.need("instruction", str), f.get("input") or ""]
        if not any(asked):
            raise BadRow("has an empty instruction")
        yield f.item(
            fields={"question": "\n\n".join(filter(None, asked))},
            choices=(str(f.need("first")), str(f.need("second"))),
            right=(winners[0] - 1,),
            answers=("AB"[winners[0] - 1],),
        )


FORMATS: dict[str, Reader] = {
    "choices": choices, "reading": reading, "c3": c3, "answers": answers, "l_eval": l_eval,
    "solutions": solutions, "gaokao": gaokao, "humaneval": humaneval, "mbpp": mbpp,
    "instructions": instructions, "conversation": conversation, "calls": calls,
    "notebooks": notebooks, "pairs": pairs,
    "ruler": lambda f: iter(()),  # made, not read: ruler.py
}  # fmt: skip
