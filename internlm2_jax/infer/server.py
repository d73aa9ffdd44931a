"""`internlm2 serve`: the engine behind OpenAI's HTTP interface, on Starlette and uvicorn.

One thread owns the engine and steps it; handlers hand it requests and wait for events on the event
loop. A client that goes away, a time-out and a server that stops all cancel their requests, which
frees the cache at once.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from internlm2_jax.errors import UserError
from internlm2_jax.infer.engine import Engine, Event, Request
from internlm2_jax.infer.openai_api import Call, Choice, ModelMissing, Reader

logger = logging.getLogger(__name__)

# Of uvicorn. An idle connection is kept longer than clients pause: one that is closed as a request
# arrives is a reset with no answer.
UVICORN: dict[str, Any] = {
    "timeout_keep_alive": 30,
    "timeout_graceful_shutdown": 10,
    "h11_max_incomplete_event_size": 2**16,
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    body_bytes: of a request's body.
    requests: choices that may wait or run at a time; more are turned away with 429.
    seconds: of one answer, waiting included; then it is cancelled, with 504 or an error event.
    body_seconds: until a body is here.
    """

    body_bytes: int = 2**20
    requests: int = 256
    seconds: float = 600.0
    body_seconds: float = 30.0


class Overloaded(Exception):
    """More requests at a time than `Limits.requests`."""


class Failed(Exception):
    """The engine's thread has ended with an error."""


class Worker:
    """The thread that owns the engine.

    Attributes: `counts` of finish reasons, `failure` when the engine broke.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.engine, self._capacity = engine, capacity
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, Callable[[Event | Exception], None]] = {}
        self._open = 0
        self._lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.tokens = self.prompt_tokens = 0
        self.failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; requests under way are cancelled."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def open(self) -> int:
        """Requests that were taken and have not ended."""
        return self._open

    @contextlib.asynccontextmanager
    async def ask(self, requests: list[Request]) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
        """Submits requests; inside, yields (index, event) until all have ended.

        Leaving early cancels the rest.

        Raises:
          UserError: a request can never be served. Overloaded, Failed.
        """
        if self.failure:
            raise Failed
        with self._lock:
            if self._open + len(requests) > self._capacity:
                raise Overloaded
            self._open += len(requests)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        numbers: list[int] = []
        gone = threading.Event()

        def tell(index: int, event: Event | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        def submit() -> None:
            for index, request in enumerate(requests):
                if gone.is_set():
                    return
                try:
                    number = self.engine.submit(request)
                except UserError as error:
                    for earlier in numbers:
                        self._drop(earlier)
                    tell(index, error)
                    return
                numbers.append(number)
                self.prompt_tokens += len(request.prompt)
                self._listeners[number] = functools.partial(tell, index)

        async def listen() -> AsyncIterator[tuple[int, Event]]:
            left = len(requests)
            while left:
                index, event = await events.get()
                if isinstance(event, Exception):
                    raise event
                left -= event.finish_reason is not None
                yield index, event

        def leave() -> None:
            for number in numbers:
                self._drop(number)

        try:
            self._inbox.put(submit)
            yield listen()
        finally:
            gone.set()
            self._inbox.put(leave)
            with self._lock:
                self._open -= len(requests)

    def _drop(self, number: int) -> None:
        if self._listeners.pop(number, None):
            self.engine.cancel(number)
            self.counts["cancelled"] += 1

    def _run(self) -> None:
        try:
            while not self._closing:
                self._work()
            for number, listener in list(self._listeners.items()):
                listener(Failed())
                self._drop(number)
        except Exception as error:
            logger.exception("the engine has failed")
            self.failure = error
            for listener in self._listeners.values():
                listener(Failed())
            self._listeners.clear()

    def _work(self) -> None:
        """Everything in the inbox, then one step; waits when there is nothing to do."""
        wait = not self.engine.busy
        while True:
            try:
                task = self._inbox.get(block=wait)
            except queue.Empty:
                break
            wait = False
            if task is None:
                return
            task()
        if not self.engine.busy:
            return
        for event in self.engine.step():
            self.tokens += len(event.tokens)
            listener = self._listeners[event.request]
            if event.finish_reason:
                self.counts[event.finish_reason] += 1
                del self._listeners[event.request]
            listener(event)


class _Refused(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        self.status, self.message, self.kind = status, message, kind


def application(
    engine: Engine, reader: Reader, *, name: str, limits: Limits, api_key: str | None = None
) -> Starlette:
    """The ASGI application. Its lifespan starts and ends the engine's thread."""
    worker = Worker(engine, limits.requests)
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(worker.close)

    def guarded(handler: Callable[[HTTPRequest], Any]) -> Callable[[HTTPRequest], Any]:
        async def handle(request: HTTPRequest) -> Response:
            try:
                if api_key is not None:
                    given = request.headers.get("authorization", "").removeprefix("Bearer ")
                    if not hmac.compare_digest(given.encode(), api_key.encode()):
                        raise _Refused(
                            401, "the API key is missing or wrong", "authentication_error"
                        )
                return await handler(request)
            except _Refused as error:
                return _error(error.status, error.message, error.kind)
            except ModelMissing as error:
                return _error(404, str(error), "invalid_request_error", "model_not_found")
            except UserError as error:
                return _error(400, str(error), "invalid_request_error")
            except Overloaded:
                response = _error(429, "too many requests at a time", "rate_limit_error")
                response.headers["retry-after"] = "1"
                return response
            except Failed:
                return _error(503, "the engine has failed; see the server's log", "server_error")
            except TimeoutError:
                return _error(504, f"no answer within {limits.seconds:g} s", "timeout_error")
            except ClientDisconnect:
                return Response(status_code=499)

        return handle

    async def health(request: HTTPRequest) -> Response:
        healthy = worker.failure is None
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    async def models(request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [_model(name, started)]})

    async def model(request: HTTPRequest) -> Response:
        if request.path_params["model"] != name:
            raise ModelMissing(f"model {request.path_params['model']!r} is not here")
        return JSONResponse(_model(name, started))

    async def metrics(request: HTTPRequest) -> Response:
        return PlainTextResponse(_metrics(worker), media_type="text/plain; version=0.0.4")

    def answering(read: Callable[[Any], Call]) -> Callable[[HTTPRequest], Any]:
        async def answer(request: HTTPRequest) -> Response:
            body = await _body(request, limits)
            call = await run_in_threadpool(read, body)  # a grammar can take a while
            choices = [Choice(call, i, reader.tokenizer) for i in range(len(call.requests))]
            if call.stream:
                return await _streamed(worker, call, choices, limits)
            task = asyncio.ensure_future(_whole(worker, call, choices, limits))
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    raise ClientDisconnect
                return JSONResponse(task.result())
            finally:
                for each in (task, gone):
                    each.cancel()
                await asyncio.gather(task, gone, return_exceptions=True)

        return answer

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/health", health),
            Route("/metrics", guarded(metrics)),
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{model:path}", guarded(model)),
            Route("/v1/chat/completions", guarded(answering(reader.chat)), methods=["POST"]),
            Route("/v1/completions", guarded(answering(reader.completion)), methods=["POST"]),
        ],
    )
    app.state.worker = worker
    return app


async def _body(request: HTTPRequest, limits: Limits) -> Any:
    """The JSON of a body that keeps the limits."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.body_bytes:
        raise _Refused(413, f"the body is over {limits.body_bytes} bytes")
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                data += part
                if len(data) > limits.body_bytes:
                    raise _Refused(413, f"the body is over {limits.body_bytes} bytes")
    except TimeoutError as error:
        raise _Refused(408, f"no whole body within {limits.body_seconds:g} s") from error
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f"the body is not JSON: {error}") from error


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


async def _disconnected(request: HTTPRequest) -> None:
    """Returns when the client has gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(
    worker: Worker, call: Call, choices: list[Choice], limits: Limits
) -> dict[str, Any]:
    async with asyncio.timeout(limits.seconds), worker.ask(call.requests) as events:
        async for index, event in events:
            for _ in choices[index].push(event):
                pass
    return {
        **_header(call, _new_id(call), chunk=False),
        "choices": [choice.whole() for choice in choices],
        "usage": _usage(call, choices),
    }


async def _streamed(
    worker: Worker, call: Call, choices: list[Choice], limits: Limits
) -> StreamingResponse:
    """The stream begins once the first event is here, so that an error still has its status."""
    stack = contextlib.AsyncExitStack()
    deadline = asyncio.get_running_loop().time() + limits.seconds
    try:
        events = await stack.enter_async_context(worker.ask(call.requests))
        async with asyncio.timeout_at(deadline):
            first = await anext(events)
    except BaseException:
        await stack.aclose()
        raise
    header = _header(call, _new_id(call), chunk=True)

    def line(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**header, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    async def lines() -> AsyncIterator[str]:
        async with stack:
            if call.kind == "chat":
                for choice in choices:
                    delta = {"role": "assistant", "content": ""}
                    yield line([{"index": choice.index, "delta": delta, "logprobs": None,
                                 "finish_reason": None}])  # fmt: skip
            try:
                async with asyncio.timeout_at(deadline):
                    for piece in choices[first[0]].push(first[1]):
                        yield line([piece])
                    async for index, event in events:
                        for piece in choices[index].push(event):
                            yield line([piece])
            except (TimeoutError, Failed) as error:
                late = isinstance(error, TimeoutError)
                message = f"no answer within {limits.seconds:g} s" if late else "the engine failed"
                kind = "timeout_error" if late else "server_error"
                yield f"data: {json.dumps({'error': {'message': message, 'type': kind}})}\n\n"
                return
            if call.include_usage:
                yield line([], usage=_usage(call, choices))
            yield "data: [DONE]\n\n"

    return _Stream(lines(), stack)


class _Stream(StreamingResponse):
    """Cancels its requests also when the client left before the first line was asked for."""

    def __init__(self, lines: AsyncIterator[str], stack: contextlib.AsyncExitStack) -> None:
        super().__init__(
            lines, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            await self._stack.aclose()


def _new_id(call: Call) -> str:
    return f"{'chatcmpl' if call.kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"


def _header(call: Call, name: str, *, chunk: bool) -> dict[str, Any]:
    kind = "text_completion"
    if call.kind == "chat":
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    return {"id": name, "object": kind, "created": int(time.time()), "model": call.model}


def _usage(call: Call, choices: list[Choice]) -> dict[str, int]:
    prompt = sum(len(request.prompt) for request in call.requests[:: call.n])
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _model(name: str, started: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": started, "owned_by": "internlm2_jax"}


def _error(status: int, message: str, kind: str, code: str | None = None) -> JSONResponse:
    body = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": body}, status)


def _metrics(worker: Worker) -> str:
    """Prometheus' text format."""
    engine = worker.engine
    gauges = {
        "requests_running": engine.running,
        "requests_waiting": engine.waiting,
        "requests_open": worker.open,
        "cache_pages_held": engine.held_pages,
        "cache_pages": engine.config.num_pages,
    }
    counters = {
        "prompt_tokens_total": worker.prompt_tokens,
        "generated_tokens_total": worker.tokens,
        "decode_steps_total": engine.steps,
        "decode_rows_total": engine.row_steps,
        "decode_tokens_total": engine.decoded,
    }
    lines = []
    for kind, values in (("gauge", gauges), ("counter", counters)):
        for name, value in values.items():
            lines += [f"# TYPE internlm2_{name} {kind}", f"internlm2_{name} {value}"]
    lines.append("# TYPE internlm2_requests_total counter")
    for reason in ("stop", "length", "cancelled"):
        count = worker.counts[reason]
        lines.append(f'internlm2_requests_total{{finish_reason="{reason}"}} {count}')
    return "\n".join(lines) + "\n"
