"""A response under a grammar parses, whatever the model would rather say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from internlm2_jax.data import chat
from internlm2_jax.errors import UserError
from internlm2_jax.infer.engine import Engine, EngineConfig, Request
from internlm2_jax.infer.sampling import Sampling

pytest.importorskip("llguidance", reason="pip install -e '.[serve]'")
from internlm2_jax.infer.constrain import Grammars, tool_schemas

SIZES = EngineConfig(slots=4, max_length=256, page=16, prefill=((4, 16),), steps=8)
PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["age", "tags"],
    "additionalProperties": False,
}
TOOLS = tool_schemas(
    [{"name": "look", "parameters": {"type": "object", "properties": {"at": {"enum": [1, 2]}},
      "required": ["at"], "additionalProperties": False}}, {"name": "stop"}]
)  # fmt: skip


@pytest.fixture(scope="module")
def grammars(vocabulary):
    return Grammars(vocabulary, vocabulary.vocab_size)


@pytest.fixture(scope="module")
def engine(tiny_chat):
    return Engine(*tiny_chat, SIZES)


def asked(vocabulary, constraint, row, temperature=1.0):
    stops = (vocabulary.eos_id, vocabulary.im_end_id)
    return Request(
        [1, 2, 3], 200, Sampling(temperature), row=row, stop_ids=stops, constraint=constraint
    )


def test_json_of_a_schema(vocabulary, grammars, engine):
    requests = [asked(vocabulary, grammars.json_schema(PERSON), row) for row in range(6)]
    free = [asked(vocabulary, None, row) for row in range(6, 8)]
    mixed = engine.run([*requests, *free])
    for response in mixed[:6]:
        assert response.finish_reason == "stop"
        value = json.loads(vocabulary.decode(response.tokens))
        assert set(value) == {"age", "tags"} and 0 <= value["age"] <= 150
        assert set(value["tags"]) <= {"a", "b"} and len(value["tags"]) <= 2
    # A grammar in the batch changes nothing for those without one.
    for request, response in zip(free, mixed[6:], strict=True):
        assert Engine(engine.model, engine.params, SIZES).run([request])[0] == response
    # The whole distribution is not the one that was drawn from.
    first = mixed[0]
    assert all(d >= p - 1e-4 for d, p in zip(first.drawn_logprobs, first.logprobs, strict=True))


def test_a_required_call_is_a_call(vocabulary, grammars, engine):
    requests = [
        asked(vocabulary, grammars.tool_call(TOOLS, required=True), row, 1.5) for row in range(6)
    ]
    for response in engine.run(requests):
        answer = chat.parse_response(response.tokens, vocabulary)
        if response.finish_reason == "length":
            continue  # `stop` takes any object, which can be long
        assert answer.problem is None and answer.content == ""
        call = json.loads(answer.tool_call["content"])
        assert call["name"] in TOOLS
        if call["name"] == "look":
            assert call["parameters"]["at"] in (1, 2)


def test_free_text_may_end_in_a_call_and_nothing_else_special(vocabulary, grammars):
    grammar = grammars.tool_call(TOOLS)
    for token in vocabulary.encode("Let me look. "):
        grammar.accept(token)
    bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
    allowed = {i for i in np.flatnonzero(bits) if i in vocabulary.special.values()}
    assert allowed == {vocabulary.action_start_id, vocabulary.im_end_id}
    grammar.accept(vocabulary.action_start_id)
    bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [vocabulary.plugin_id]


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, ["no object"]])
def test_bad_schemas(grammars, schema):
    with pytest.raises(UserError):
        grammars.json_schema(schema)
