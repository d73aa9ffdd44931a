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
        fields={"question": f.text("question"), "context": f.optional("context")},
        choices=texts,
        right=right,
        answers=tuple(LETTERS[i] for i in right),
    )


def reading(f: Fields) -> Iterator[Item]:
    """RACE: an article with questions, options and answers, lists of one length."""
    article, questions = f.text("article"), f.texts("questions")
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
    lines, questions, identity = f.texts("lines"), f.need("questions", list), f.text("id")
    for i, asked in enumerate(questions):
        place = f"its question {i + 1}"
        texts = _texts(_inside(asked, "choice", list, place))
        right = _right(_inside(asked, "answer", object, place), texts, by_text=True)
        yield Item(
            f"{identity}/{i}", f.row.where, f.row.group,
            {"question": _inside(asked, "question", str, place), "context": "\n".join(lines)},
            tuple(LETTERS[i] for i in right), texts, right,
        )  # fmt: skip


def _texts(given: Any) -> tuple[str, ...]:
    """Choices without the letters that some data sets write before them."""
    if not isinstance(given, (list, tuple)) or len(given) < 2:
        raise BadRow(f"has choices {given!r:.60}; expected a list of two or more")
    if len(given) > len(LETTERS):
        raise BadRow(f"has {len(given)} choices; the most is {len(LETTERS)}")
    if bad := [text for text in given if not _scalar(text)]:
        raise BadRow(f"has a choice {bad[0]!r:.60}; expected a text that is not empty")
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
        aliases = given.get("aliases") or []
        if not isinstance(aliases, list):
            raise BadRow(f"has 'aliases' of type {type(aliases).__name__}; expected list")
        given = [given.get("value"), *aliases]
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
        fields={"question": f.need("question", str), "context": f.optional("context")},
        answers=tuple(dict.fromkeys(right)),
        check={
            "classes": f.texts("classes") if f.get("classes") else [], "length": f.get("length")
        },
    )  # fmt: skip


def l_eval(f: Fields) -> Iterator[Item]:
    """L-Eval: one long input, with a list of instructions and one of outputs."""
    asked, outputs = f.texts("instructions"), f.need("outputs", list)
    if len(asked) != len(outputs):
        raise BadRow(f"has {len(asked)} instructions and {len(outputs)} outputs")
    for i, (question, output) in enumerate(zip(asked, outputs, strict=True)):
        if not _scalar(output):
            raise BadRow(f"has output {output!r:.60}; expected a text that is not empty")
        fields = {"question": question, "context": f.text("input")}
        yield f.item(f"/{i}", fields=fields, answers=(str(output),))


def squad(f: Fields) -> Iterator[Item]:
    """SQuAD 1.1 and 2.0: an article's paragraphs with their questions; those that have no answer
    (`is_impossible`) are left out."""
    for n, paragraph in enumerate(f.need("paragraphs", list), 1):
        context = _inside(paragraph, "context", str, f"paragraph {n}")
        for asked in _inside(paragraph, "qas", list, f"paragraph {n}"):
            place = f"a question of paragraph {n}"
            given = _inside(asked, "answers", list, place)
            if asked.get("is_impossible") is True:
                continue
            right = [
                _inside(answer, "text", str, f"an answer of paragraph {n}") for answer in given
            ]
            if not any(text.strip() for text in right):
                raise BadRow(f"has no answer in {place}")
            question = _inside(asked, "question", str, place)
            yield Item(
                str(_inside(asked, "id", (str, int), place)), f.row.where, f.optional("title"),
                {"question": question, "context": context}, tuple(dict.fromkeys(right)),
                check={"documents": [context]},
            )  # fmt: skip


def hotpotqa(f: Fields) -> Iterator[Item]:
    """HotpotQA: a question over several documents, each [title, [sentences]]."""
    documents = []
    for n, document in enumerate(f.need("context", list), 1):
        if not isinstance(document, list) or len(document) != 2:
            raise BadRow(f"has document {n} {document!r:.60}; expected [title, [sentences]]")
        title, sentences = document
        if not isinstance(title, str) or not _all(sentences, str):
            raise BadRow(f"has document {n} {document!r:.60}; expected [title, [sentences]]")
        documents.append(f"{title}\n{''.join(sentences)}")
    if not documents:
        raise BadRow("has no documents in its 'context'")
    yield f.item(
        fields={"question": f.text("question"), "context": "\n\n".join(documents)},
        answers=(f.text("answer"),),
        check={"documents": documents},
    )


def solutions(f: Fields) -> Iterator[Item]:
    """GSM8K (the answer after "####") and MATH (in the last box, or in a field of its own)."""
    solution = f.text("solution")
    answer = f.get("answer")
    if answer is not None and not _scalar(answer):
        raise BadRow(f"has answer {answer!r:.60}; expected a text that is not empty")
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
    parts = given if isinstance(given, list) else [given]
    if not parts or not all(map(_scalar, parts)):
        raise BadRow(f"has answer {given!r:.60}; expected letters or a text")
    right = [str(part) for part in parts]
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
        answers=(f.optional("canonical_solution"),),
        check={
            "kind": "code", "tests": [f"{test}\n\ncheck({name})"], "functions": defined,
            "before": prompt, "entry": name,
        },
    )  # fmt: skip


def mbpp(f: Fields) -> Iterator[Item]:
    """MBPP: a task in words, three assertions; the functions they call."""
    code, tests = f.text("code").replace("\r\n", "\n"), f.texts("test_list")
    defined = re.findall(r"^(?:def|class) (\w+)", code, re.M)
    called = [name for name in dict.fromkeys(defined) if any(name in test for test in tests)]
    if not called:
        raise BadRow("has tests that call no function of its code")
    yield f.item(
        fields={"question": f.text("text"), "tests": "\n".join(tests), "code": code},
        answers=(code,),
        check={
            "kind": "code", "tests": list(tests), "functions": called,
            "setup": f.optional("test_setup_code"),
        },
    )  # fmt: skip


# ------------------------------------------------------------------------------ instructions, tools


def instructions(f: Fields) -> Iterator[Item]:
    """IFEval: a prompt, the names of rules and their arguments."""
    from internlm2_jax.evals.rules import RULES

    names, given = f.texts("instruction_id_list"), f.need("kwargs", list)
    if len(names) != len(given):
        raise BadRow(f"has {len(names)} instructions and {len(given)} kwargs")
    if unknown := [name for name in names if name not in RULES]:
        raise BadRow(f"has instruction {unknown[0]!r}, which no rule checks")
    if bad := [kwargs for kwargs in given if not isinstance(kwargs, Mapping)]:
        raise BadRow(f"has {bad[0]!r:.60} in its kwargs; expected objects")
    rules = [
        [name, {k: v for k, v in kwargs.items() if v is not None}]
        for name, kwargs in zip(names, given, strict=True)
    ]
    yield f.item(fields={"question": f.text("prompt")}, check={"rules": rules})


def conversation(f: Fields) -> Iterator[Item]:
    """MT-Bench: the first turn of a conversation, without a right answer."""
    turns = f.texts("turns")
    if not turns or not turns[0].strip():
        raise BadRow("has no first turn")
    answers = tuple(f.texts("reference")) if f.get("reference") else ()
    yield f.item(fields={"question": turns[0]}, answers=answers)


def calls(f: Fields) -> Iterator[Item]:
    """T-Eval: a conversation, and the call that should follow, as JSON or in a template."""
    said, truth = f.need("origin_prompt", list), f.need("ground_truth", dict)
    action = _inside(truth, "action", str, "its ground_truth")
    args = _inside(truth, "args", dict, "its ground_truth")
    about, template = f.get("meta_data") or {}, f.need("template", dict)
    style = _inside(about, "response_format", str, "its meta_data") if about else "json"
    sides = [""] if style == "json" else ["_start", "_end"]
    for name in [f"{part}{side}" for part in ("thought", "action", "args") for side in sides]:
        _inside(template, name, str, "its template")
    if not said:
        raise BadRow("has no turn in its origin_prompt")
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
            "action": action, "args": args, "template": template, "style": style,
        },
    )  # fmt: skip


def notebooks(f: Fields) -> Iterator[Item]:
    """CIBench: a notebook whose text asks and whose code answers; an interpreter session.

    Steps are "exec" (it should run), "num" or "general" (it should print what the notebook has),
    "text" (something like it) or "vis" (a picture, which is not compared).
    """
    about = f.need("metadata", dict) if f.get("metadata") else {}
    kinds = about.get("step_types") or []
    if not _all(kinds, str):
        raise BadRow(f"has step_types {kinds!r:.60}; expected texts")
    steps: list[dict[str, Any]] = []
    question = ""
    for n, cell in enumerate(f.need("cells", list), 1):
        kind = _inside(cell, "cell_type", str, f"cell {n}")
        source = _joined(_inside(cell, "source", (str, list), f"cell {n}"), f"cell {n}")
        if kind == "markdown":
            question = source.strip()
        elif kind == "code" and question:
            shown = _shown(cell.get("outputs") or [], f"cell {n}")
            kind = "vis" if "image/png" in shown else "general" if "text/plain" in shown else "exec"
            kind = kinds[len(steps)] if len(kinds) > len(steps) else kind
            output = _joined(shown.get("text/plain", ""), f"an output of cell {n}")
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
    # PandaLM has a few answers that are no texts: false, and numbers.
    first, second = (str(f.need(name, (str, int, float))) for name in ("first", "second"))
    if bad := [label for label in labels if label not in (0, 1, 2)]:
        raise BadRow(f"has label {bad[0]!r}; it is 1, 2, or 0 for a tie")
    counts = {label: labels.count(label) for label in (1, 2, 0)}
    best = max(counts.values())
    winners = [label for label, count in counts.items() if count == best]
    if winners in ([1], [2]):
        asked = [f.need("instruction", str), f.optional("input")]
        if not any(asked):
            raise BadRow("has an empty instruction")
        yield f.item(
            fields={"question": "\n\n".join(filter(None, asked))},
            choices=(first, second),
            right=(winners[0] - 1,),
            answers=("AB"[winners[0] - 1],),
        )


FORMATS: dict[str, Reader] = {
    "choices": choices, "reading": reading, "c3": c3, "answers": answers, "l_eval": l_eval,
    "squad": squad, "hotpotqa": hotpotqa,
    "solutions": solutions, "gaokao": gaokao, "humaneval": humaneval, "mbpp": mbpp,
    "instructions": instructions, "conversation": conversation, "calls": calls,
    "notebooks": notebooks, "pairs": pairs,
    "ruler": lambda f: iter(()),  # made, not read: ruler.py
}  # fmt: skip


# ------------------------------------------------------------------------------ parts of a row


def _scalar(value: Any) -> bool:
    """A number, or a text that is not empty."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _joined(value: str | list[Any], place: str) -> str:
    """A text, or a list of its lines, as notebooks have them."""
    if not isinstance(value, str) and not _all(value, str):
        raise BadRow(f"has {value!r:.60} in {place}; expected text")
    return "".join(value)


def _shown(outputs: Any, place: str) -> Mapping[str, Any]:
    """What the last output of a cell shows, by kind."""
    if not _all(outputs, dict):
        raise BadRow(f"has outputs {outputs!r:.60} in {place}; expected objects")
    data = outputs[-1].get("data", {}) if outputs else {}
    if not isinstance(data, Mapping):
        raise BadRow(f"has an output of type {type(data).__name__} in {place}")
    return data


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(part, kind) for part in value)


def _inside(value: Any, name: str, kind: Any, place: str) -> Any:
    """A field of a part of a row."""
    if not isinstance(value, Mapping) or value.get(name) is None:
        raise BadRow(f"has no {name!r} in {place}")
    if not isinstance(value[name], kind):
        raise BadRow(f"has {name!r} of type {type(value[name]).__name__} in {place}")
    return value[name]
