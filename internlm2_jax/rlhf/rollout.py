"""Rollouts as arrays: what the engine sampled, laid out for the trainer's forward pass.

Prompt and response lie side by side from column 0 and padding follows, so that default positions
and plain causal attention are right for every row. Column t of the [B, W - 1] arrays speaks of the
step that predicts token t + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from internlm2_jax.errors import UserError
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A batch of sampled responses.

    Attributes:
        tokens: [B, W] int32, prompt, response, padding.
        mask: [B, W - 1] bool, true where token t + 1 belongs to the response.
        logprobs: [B, W - 1] float32, of the sampled tokens under the full distribution, 0 off mask.
        finished: [B] bool, the response ended by itself.
        responses: response ids, the stop token included where it was sampled.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    finished: np.ndarray
    responses: list[list[int]]

    @property
    def lengths(self) -> np.ndarray:
        """[B] response lengths in tokens."""
        return self.mask.sum(axis=1)


def sample(
    model: Any,
    params: Any,
    prompts: Sequence[list[int]],
    *,
    prompt_length: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """Samples one response per prompt; every batch has the shape [B, prompt_length + max_new].

    Errors: UserError when a prompt is longer than `prompt_length` tokens.
    """
    longest = max(map(len, prompts))
    if longest > prompt_length:
        raise UserError(
            f"a prompt of {longest} tokens exceeds prompt_length {prompt_length}; raise it"
        )
    out = engine.generate(
        model,
        params,
        list(prompts),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        pad_to=prompt_length,
    )
    width = prompt_length + max_new_tokens
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    mask = np.zeros((len(prompts), width - 1), bool)
    logprobs = np.zeros((len(prompts), width - 1), np.float32)
    for row, (prompt, response) in enumerate(zip(prompts, out.tokens, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        tokens[row, :end] = [*prompt, *response]
        mask[row, start - 1 : end - 1] = True
        logprobs[row, start - 1 : end - 1] = out.logprobs[row]
    return Rollout(tokens, mask, logprobs, np.asarray(out.finished, bool), out.tokens)
