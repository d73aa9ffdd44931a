"""Answers to conversations, through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internlm2_jax.data import chat
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.progress import Progress

GREEDY = Sampling(temperature=0.0)


def respond(
    model: Any,
    params: Any,
    vocabulary: Tokenizer,
    conversations: Sequence[Sequence[dict[str, Any]]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = 64,
    label: str = "",
) -> list[str]:
    """One response per conversation, as text. With a `label`, a progress line is shown."""
    prompts = [
        chat.render(messages, vocabulary, add_generation_prompt=True).ids
        for messages in conversations
    ]
    # one width for all batches of a call, so that each compiles once
    longest = max(map(len, prompts), default=0)
    responses: list[str] = []
    with Progress(label, len(prompts), "response", silent=not label) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            out = engine.generate(
                model,
                params,
                batch,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                stop_ids=(vocabulary.eos_id, vocabulary.im_end_id),
                pad_to=longest,
                rows=range(start, start + len(batch)),
            )
            responses += [vocabulary.decode(ids) for ids in out.tokens]
            progress.update(len(batch))
    return responses
