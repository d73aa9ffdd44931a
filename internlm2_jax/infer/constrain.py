"""Responses that follow a grammar: a JSON schema, or the format of a tool call.

llguidance says which tokens may come next; the sampler masks the rest. Special tokens are terminals
of the grammar by name and never text, so a call is always closed and its JSON is always whole,
unless the length limit cuts it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from internlm2_jax.data import tokenizer as names
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer import sampling

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# Room for indentation, but no endless spaces between two parts of a value.
WHITESPACE = {"x-guidance": {"whitespace_pattern": r"[\n ]{0,16}"}}


class Grammar:
    """One response's way through a grammar (`engine.Constraint`)."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._words = matcher, words

    def mask(self) -> np.ndarray:
        """Tokens that may come next; only the end of the turn once the grammar is at its end."""
        from llguidance.numpy import fill_next_token_bitmask

        mask = np.zeros((1, self._words), np.int32)
        fill_next_token_bitmask(self._matcher, mask)
        return mask[0]

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} is outside the grammar: {self._matcher.get_error()}")


class Grammars:
    """Makes grammars over a tokenizer. One is enough for a program: it indexes all tokens.

    Args:
      vocab_size: of the model; ids that the tokenizer does not have are never allowed.

    Errors: UserError for a schema that is not one, or uses what llguidance does not know.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise UserError(
                "JSON schemas and tool grammars need llguidance: pip install -e '.[serve]'"
            ) from error
        self._lib = llguidance
        self._words = sampling.words(vocab_size)
        wrapper = llguidance.TokenizerWrapper(_Pieces(tokenizer, vocab_size))
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=vocab_size)

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """A response that is one JSON value of this schema."""
        _check_schema(schema, "schema")
        text = json.dumps({**schema, **WHITESPACE})
        return self._grammar(self._lib.LLMatcher.grammar_from_json_schema(text))

    def tool_call(
        self, tools: Mapping[str, Mapping[str, Any]], *, required: bool = False
    ) -> Grammar:
        """Free text that may end in a plugin call of one of `tools`; `required`: the call alone.

        Args:
          tools: JSON schema of each tool's parameters, by name.
        """
        calls = []
        for name, schema in tools.items():
            _check_schema(schema, f"parameters of tool {name!r}")
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, "parameters": schema},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        one = {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **WHITESPACE}
        return self._grammar(
            f"start: {'call' if required else 'text call?'}\n"
            "text: /(.|\\n)*/\n"
            f'call: {names.ACTION_START} {names.PLUGIN} "\\n" body {names.ACTION_END}\n'
            f"body: %json {json.dumps(one)}\n"
        )

    def _grammar(self, text: str) -> Grammar:
        matcher = self._lib.LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())[:300]
            raise UserError(f"this grammar cannot be followed: {why}")
        return Grammar(matcher, self._words)


class _Pieces:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.im_end_id, tokenizer.bos_id
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for i in range(vocab_size):
            piece = tokenizer.token_bytes(i) if 0 < i < tokenizer.vocab_size else b""
            if not piece:
                self.special_token_ids.append(i)
                known = i < tokenizer.vocab_size and i > 0
                piece = (tokenizer.show([i]) if known else f"<|none_{i}|>").encode()
            self.tokens.append(piece)
        self._encode = functools.partial(tokenizer.encode)

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._encode(text)


def _check_schema(schema: Any, what: str) -> None:
    if not isinstance(schema, Mapping):
        raise UserError(f"{what} is {type(schema).__name__}; a JSON schema is an object")


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """{name: schema of its parameters} of functions {"name", "parameters"}."""
    return {tool["name"]: tool.get("parameters") or ANY_OBJECT for tool in tools}
