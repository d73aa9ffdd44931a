"""Answers to conversations do not depend on how they are batched."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from internlm2_jax.infer.chat import respond
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset

ASKED = [[{"role": "user", "content": "word " * n}] for n in (1, 9, 3, 5, 2)]


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_batch_size_changes_nothing(vocabulary, temperature):
    model = build(dataclasses.replace(preset("tiny"), vocab_size=vocabulary.vocab_size))
    params = model.init(jax.random.key(0))
    answers = [
        respond(
            model,
            params,
            vocabulary,
            ASKED,
            max_new_tokens=6,
            sampling=Sampling(temperature=temperature),
            batch_size=size,
        )
        for size in (2, 8)
    ]
    # Another size is another program, which may round otherwise: a draw on the border of two
    # tokens then falls either way. Random numbers that followed the batch would change all.
    same = sum(a == b for a, b in zip(*answers, strict=True))
    assert same >= len(ASKED) - (temperature > 0)
    assert len(answers[0]) == len(ASKED)
    assert "<|im_end|>" not in "".join(answers[0])
