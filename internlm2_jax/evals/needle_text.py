"""The words of the needle test: needles, questions and prompts in each language."""

from __future__ import annotations

from dataclasses import dataclass

from internlm2_jax.data import haystacks
from internlm2_jax.data.tasks import NAMES


@dataclass(frozen=True)
class NeedleText:
    """The words of the test in one language; {subject} and {answer} are filled in.

    buffer: tokens kept free for the response and the chat frame (OpenCompass: 600 en, 200 zh).
    """

    needle: str
    question: str
    opening: str
    prompt: str
    subjects: tuple[str, ...]
    answers: tuple[str, ...]
    buffer: int


# Repeat 0 with seed 0 in Chinese is the report's own needle. Subjects and answers are stepped
# through together; their numbers have no common factor, so pairs repeat only after their product.
TEXTS: dict[str, NeedleText] = {
    "zh": NeedleText(
        needle="{subject}最喜欢的实习的地点就是{answer}。",
        question="{subject}最喜欢的实习地点是哪里？"
        "你的回答格式应该为“{subject}最喜欢的实习地点就是________。”",
        opening="{subject}最喜欢的实习的地点就是",
        prompt="请阅读下面的文档，然后简短地回答最后的问题。\n{haystack}\n\n问题：{question}",
        subjects=("小明", "小红", "小刚", "李雷", "韩梅", "王芳", "张伟"),
        answers=(
            "上海人工智能实验室", "北京天文馆", "广州植物园", "成都水电站", "杭州图书馆",
            "南京博物院", "青岛造船厂", "西安气象台",
        ),
        buffer=200,
    ),
    "en": NeedleText(
        needle="The favourite internship place of {subject} is the {answer}.",
        question="What is the favourite internship place of {subject}? Answer in the form "
        '"The favourite internship place of {subject} is the ________."',
        opening="The favourite internship place of {subject} is the",
        prompt="Read the document below, then answer the question at its end in one sentence.\n"
        "{haystack}\n\nQuestion: {question}",
        subjects=("Anna", "Boris", "Chen", "Dalia", "Emil", "Farah", "Goran"),
        answers=(
            "Shanghai AI Laboratory", "Lisbon planetarium", "Bergen fish market",
            "Nairobi seed bank", "Quito observatory", "Dublin print museum",
            "Hobart weather station", "Kyoto railway yard",
        ),
        buffer=600,
    ),
    # What data/haystacks.py trains on, so that a tiny model can be measured.
    "pairs": NeedleText(
        needle=haystacks.FACT,
        question=haystacks.QUESTION,
        opening=haystacks.OPENING,
        prompt="{haystack}\n{question}",
        subjects=NAMES[:25],
        answers=haystacks.PARTNERS,
        buffer=12,
    ),
}  # fmt: skip
