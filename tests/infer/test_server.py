"""The HTTP server on a real socket, driven by the real client and by clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import numpy as np
import pytest

from internlm2_jax.data import chat
from internlm2_jax.infer.engine import Engine, EngineConfig, Request
from internlm2_jax.infer.sampling import Sampling

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")  # what the client stands on

NAME = "tiny-chat"
USER = [{"role": "user", "content": "Say something."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {"at": {"enum": ["here", "there"]}},
                "required": ["at"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(autouse=True)
def nothing_left(served):
    """After each test: no request under way and no page held."""
    yield
    deadline = time.monotonic() + 10
    engine = served.worker.engine
    while (engine.busy or served.worker.open) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not engine.busy and engine.held_pages == 0 and served.worker.open == 0


def test_models_and_health(served, client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    with pytest.raises(openai.NotFoundError, match="'other' is not here"):
        client.models.retrieve("other")


def test_chat_equals_the_engine(client, tiny_chat, vocabulary):
    answer = client.chat.completions.create(
        model=NAME, messages=USER, max_tokens=20, temperature=0.7, seed=5, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    prompt = chat.render(USER, vocabulary, add_generation_prompt=True).ids
    stops = (vocabulary.eos_id, vocabulary.im_end_id)
    config = EngineConfig(slots=4, max_length=512, page=16, prefill=((1, 64), (4, 64)), steps=8)
    want = Engine(*tiny_chat, config).run(
        [Request(prompt, 20, Sampling(0.7), seed=5, stop_ids=stops)]
    )[0]
    choice = answer.choices[0]
    assert choice.message.content == vocabulary.decode(want.tokens)
    assert choice.finish_reason == want.finish_reason
    got = [entry.logprob for entry in choice.logprobs.content]
    np.testing.assert_allclose(got, want.logprobs, atol=1e-5)
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(want.tokens)


def test_a_stream_is_the_answer_in_pieces(client):
    settings = {"model": NAME, "messages": USER, "max_tokens": 30, "seed": 2, "n": 2}
    whole = client.chat.completions.create(**settings)
    stream = client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    )
    text, ends, usage = ["", ""], {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert text == [choice.message.content for choice in whole.choices]
    assert ends == {i: choice.finish_reason for i, choice in enumerate(whole.choices)}
    assert usage == whole.usage
    assert text[0] != text[1]


def test_completions(client, vocabulary):
    out = client.completions.create(
        model=NAME, prompt=["def f(", "x = "], n=2, max_tokens=6, temperature=0, logprobs=1
    )
    assert [choice.index for choice in out.choices] == [0, 1, 2, 3]
    assert out.choices[0].text == out.choices[1].text  # greedy
    assert len(out.choices[0].logprobs.tokens) == 6
    ids = [vocabulary.bos_id, *vocabulary.encode("def f(")]
    again = client.completions.create(model=NAME, prompt=ids, max_tokens=6, temperature=0)
    assert again.choices[0].text == out.choices[0].text
    stop = out.choices[2].text[2:4]
    cut = client.completions.create(
        model=NAME, prompt="x = ", max_tokens=6, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == out.choices[2].text.split(stop)[0]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client, stream):
    asked = {
        "model": NAME, "messages": USER, "tools": TOOLS, "tool_choice": "required",
        "max_tokens": 200, "seed": 1,
    }  # fmt: skip
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        calls = [c for k in chunks for x in k.choices for c in x.delta.tool_calls or []]
        ends = [x.finish_reason for k in chunks for x in k.choices if x.finish_reason]
        assert not any(x.delta.content for k in chunks for x in k.choices)
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        calls, ends = choice.message.tool_calls, [choice.finish_reason]
    assert ends == ["tool_calls"] and len(calls) == 1
    assert calls[0].function.name == "look"
    assert json.loads(calls[0].function.arguments)["at"] in ("here", "there")
    # The call and its result go back into the conversation.
    function = {"name": "look", "arguments": calls[0].function.arguments}
    turns = [
        *USER,
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": calls[0].id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "nothing there"},
    ]  # fmt: skip
    last = client.chat.completions.create(model=NAME, messages=turns, tools=TOOLS, max_tokens=5)
    assert last.choices[0].finish_reason in ("length", "stop")


def test_json_schema(client):
    schema = TOOLS[0]["function"]["parameters"]
    answer = client.chat.completions.create(
        model=NAME, messages=USER, max_tokens=200, seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content)["at"] in ("here", "there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature is -1.0"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"max_tokens": 10_000}, "max_tokens is 10000; this server takes 1 to 256"),
        ({"messages": []}, "messages is not a list of one or more"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role is 'wizard'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is not text"),
        ({"messages": [{"role": "user", "content": "word " * 280}]}, "can never fit"),
        ({"frequency_penalty": 1}, "frequency_penalty is 1; this server does not do that"),
        ({"extra_body": {"magic": 1}}, "unknown field 'magic'"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"n": 500}, "n is 500"),
        ({"stop": [""]}, "stop is a text"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"response_format": {"type": "xml"}}, "response_format type"),
        (
            {"response_format": {"type": "json_schema",
                                 "json_schema": {"name": "x", "schema": {"type": "xml"}}}},
            "grammar cannot be followed",
        ),
    ],
)  # fmt: skip
def test_bad_requests(client, change, message):
    asked = {"model": NAME, "messages": USER, "max_tokens": 4, **change}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**asked)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked, stream=True)


def test_malformed_bodies(served):
    url = f"{served.url}/v1/chat/completions"

    def status(body: bytes, **headers: str) -> int:
        return httpx.post(url, content=body, headers=headers, timeout=10).status_code

    assert status(b"{") == 400
    assert status(b"[1]") == 400
    assert status(b"\xff\xfe") == 400
    assert status(b"[" * 15_000) == 400
    assert status(b'{"model": "tiny-chat", "messages": NaN}') == 400
    assert status(b" " * 20_001) == 413
    assert httpx.post(url, content=iter([b" " * 9000] * 3), timeout=10).status_code == 413
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{served.url}/nowhere").status_code == 404


def test_clients_that_leave(served, client):
    """In mid-stream, before an answer, and with half a body."""
    counts = served.worker.counts
    before = counts["cancelled"]
    with client.chat.completions.create(
        model=NAME, messages=USER, max_tokens=256, stream=True, temperature=0,
        extra_body={"min_p": 1.0}, stop=["\x00"],
    ) as stream:  # fmt: skip
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).completions.create(
            model=NAME, prompt=[[5] * 200] * 24, max_tokens=256
        )
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
    deadline = time.monotonic() + 60  # the engine hears of it between two steps
    while (served.worker.open or counts["cancelled"] == before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not served.worker.open and counts["cancelled"] > before


def test_metrics(served, client):
    client.completions.create(model=NAME, prompt="a", max_tokens=3, temperature=0)
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(values["internlm2_generated_tokens_total"]) >= 3
    assert values["internlm2_cache_pages"] == "128" and values["internlm2_requests_waiting"] == "0"
    assert sum(int(v) for k, v in values.items() if k.startswith("internlm2_requests_total")) > 0


def test_keys_times_and_crowds(serving):
    limits = {"requests": 4, "seconds": 0.3}
    with serving(api_key="secret", **limits) as served:
        base = f"{served.url}/v1"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=base, api_key="wrong").models.list()
        assert httpx.get(f"{served.url}/metrics").status_code == 401
        client = openai.OpenAI(base_url=base, api_key="secret", max_retries=0)
        assert len(client.models.list().data) == 1
        with pytest.raises(openai.RateLimitError, match="too many requests"):
            client.completions.create(model=NAME, prompt="a", n=5, max_tokens=2)
        engine = served.worker.engine
        step = engine.step

        def slow():
            time.sleep(0.1)
            return step()

        engine.step = slow
        with pytest.raises(openai.InternalServerError, match=r"no answer within 0\.3 s"):
            client.completions.create(model=NAME, prompt="a", max_tokens=256, temperature=0)

        def broken():
            raise RuntimeError("a fault of the device")

        engine.step = broken
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="engine has failed"):
                client.completions.create(model=NAME, prompt="a", max_tokens=5)
        assert httpx.get(f"{served.url}/health").status_code == 503


@pytest.mark.slow
def test_a_minute_of_64_clients(served):
    """Some leave in mid-stream, some send nonsense; every other request is answered whole."""
    end = time.monotonic() + 60
    counts = dict.fromkeys(("answered", "left", "refused", "busy"), 0)

    async def one(number: int) -> None:
        random = np.random.default_rng(number)
        async with (
            openai.AsyncOpenAI(
                base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=120
            ) as client,
            httpx.AsyncClient(timeout=120) as raw,
        ):
            while time.monotonic() < end:
                kind = random.random()
                limit = int(random.integers(1, 60))
                asked = {"model": NAME, "messages": USER, "max_tokens": limit}
                try:
                    if kind < 0.4:
                        answer = await client.chat.completions.create(**asked)
                        assert answer.usage.completion_tokens <= limit
                        assert answer.choices[0].finish_reason in ("stop", "length")
                        counts["answered"] += 1
                    elif kind < 0.7:
                        last = None
                        async for chunk in await client.chat.completions.create(
                            **asked, stream=True
                        ):
                            last = chunk
                        assert last.choices[0].finish_reason in ("stop", "length")
                        counts["answered"] += 1
                    elif kind < 0.85:
                        async with await client.chat.completions.create(
                            **{**asked, "max_tokens": 256}, stream=True
                        ) as stream:
                            async for _ in stream:
                                break
                        counts["left"] += 1
                    else:
                        size = 30_000 if kind > 0.93 else 10
                        body = random.bytes(size)
                        url = f"{served.url}/v1/chat/completions"
                        got = await raw.post(url, content=body)
                        assert got.status_code in (400, 413), got.status_code
                        counts["refused"] += 1
                except openai.RateLimitError:
                    counts["busy"] += 1
                    await asyncio.sleep(0.05)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number) for number in range(64)))

    asyncio.run(all_of_them())
    print(counts)
    assert min(counts["answered"], counts["left"], counts["refused"]) > 50
    assert served.worker.failure is None
