"""A tiny chat model, and a server on a real socket."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from internlm2_jax.infer.engine import Engine, EngineConfig
from internlm2_jax.models.build import build
from internlm2_jax.models.config import preset

NAME = "tiny-chat"


@pytest.fixture(scope="session")
def tiny_chat(vocabulary):
    """(model, params) over the tests' tokenizer."""
    cfg = dataclasses.replace(
        preset("tiny", initializer_range=0.2), vocab_size=vocabulary.vocab_size,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = build(cfg)
    return model, jax.jit(model.init)(jax.random.key(0))


@dataclasses.dataclass
class Served:
    url: str
    worker: Any
    server: Any


@contextlib.contextmanager
def _serving(
    tiny_chat: Any, vocabulary: Any, *, api_key: str | None = None, **limits: Any
) -> Iterator[Served]:
    slots, max_length = 4, 512
    uvicorn = pytest.importorskip("uvicorn", reason="pip install -e '.[serve]'")
    pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
    pytest.importorskip("llguidance", reason="pip install -e '.[serve]'")
    from internlm2_jax.infer import server
    from internlm2_jax.infer.constrain import Grammars
    from internlm2_jax.infer.openai_api import Reader

    model, params = tiny_chat
    config = EngineConfig(
        slots=slots, max_length=max_length, page=16, prefill=((1, 64), (slots, 64)), steps=8,
        top_logprobs=3,
    )  # fmt: skip
    engine = Engine(model, params, config, vocabulary)
    engine.warm_up()
    reader = Reader(
        vocabulary,
        Grammars(vocabulary, model.cfg.vocab_size),
        name=NAME,
        max_length=max_length,
        max_tokens=256,
        top_logprobs=3,
    )
    app = server.application(
        engine, reader, name=NAME, limits=server.Limits(**limits), api_key=api_key
    )
    http = uvicorn.Server(
        uvicorn.Config(
            app, port=0, log_level="error", **server.UVICORN | {"timeout_graceful_shutdown": 2}
        )
    )
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", app.state.worker, http)
    finally:
        http.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving(tiny_chat, vocabulary):
    """Starts a server: `with serving(api_key=..., **limits) as served`."""
    return functools.partial(_serving, tiny_chat, vocabulary)


@pytest.fixture(scope="module")
def served(serving):
    with serving(body_bytes=20_000, requests=32) as it:
        yield it
