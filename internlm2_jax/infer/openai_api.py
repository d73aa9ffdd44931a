"""OpenAI's chat completions and completions as requests to the engine, and its events as theirs.

A body is read strictly: a field that is unknown, or asks for what the engine does not do, is an
error that names it, so nothing is ignored silently. Beside OpenAI's fields there are `top_k`,
`min_p`, `repetition_penalty`.

Tools are InternLM2's plugins: their list is a system turn, a call is the end of an assistant turn,
and a result is an environment turn (data/chat.py). A turn has at most one call.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm2_jax.data import chat
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.infer.constrain import ANY_OBJECT, Grammars, tool_schemas
from internlm2_jax.infer.engine import Event, Request
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.infer.text import TextStream

# Accepted and without effect: labels of the caller's own.
LABELS = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key"}
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
COMMON = {"model", "max_tokens", "n", "seed", "stop", "stream", "stream_options"}
CHAT = {
    "messages", "max_completion_tokens", "logprobs", "top_logprobs", "response_format", "tools",
    "tool_choice", "parallel_tool_calls",
}  # fmt: skip
COMPLETION = {"prompt", "logprobs", "echo", "best_of"}
# Fields of theirs with the one value that means what the engine does.
NEUTRAL = {
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}),
    "parallel_tool_calls": (None, False, True), "echo": (None, False), "best_of": (None, 1),
    "suffix": (None,),
}  # fmt: skip
MAX_CHOICES = 128


@dataclasses.dataclass
class Call:
    """A body that was understood.

    requests: one for every choice, those of one prompt together.
    top_logprobs: alternatives wanted with each token; None for no log-probabilities at all.
    stop: stop strings.
    """

    kind: str
    model: str
    requests: list[Request]
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    stop: tuple[str, ...]
    n: int


class Reader:
    """Reads bodies for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammars: Grammars,
        *,
        name: str,
        max_length: int,
        max_tokens: int,
        top_logprobs: int,
    ) -> None:
        self.tokenizer, self._grammars, self._name = tokenizer, grammars, name
        self._max_length, self._max_tokens = max_length, max_tokens
        self._top_logprobs = top_logprobs

    def chat(self, body: Any) -> Call:
        """A body of /v1/chat/completions. Errors: UserError that names the field."""
        fields = self._fields(body, CHAT)
        tools = _tools(fields.get("tools"))
        choice = _tool_choice(fields.get("tool_choice"), tools)
        messages = _messages(fields.get("messages"))
        if tools and choice != "none":
            listing = json.dumps(tools, ensure_ascii=False)
            first = 1 if messages[0]["role"] == "system" else 0
            messages.insert(first, {"role": "system", "name": "plugin", "content": listing})
        ids = chat.render(messages, self.tokenizer, add_generation_prompt=True).ids
        format_of = fields.get("response_format") or {"type": "text"}
        wanted = _integer(fields, "top_logprobs", 0, 0, self._top_logprobs)
        if wanted and not fields.get("logprobs"):
            raise UserError("top_logprobs needs logprobs: true")

        def constraint() -> Any:
            if choice not in ("none", "auto"):
                names = [t for t in tools if choice in ("required", t["name"])]
                return self._grammars.tool_call(tool_schemas(names), required=True)
            schema = _schema(format_of)
            if schema is not None:
                return self._grammars.json_schema(schema)
            if tools and choice == "auto":
                return self._grammars.tool_call(tool_schemas(tools))
            return None

        name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
        top = wanted if _flag(fields, "logprobs") else None
        return self._call("chat", fields, [ids], name, constraint, top)

    def completion(self, body: Any) -> Call:
        """A body of /v1/completions. Errors: UserError that names the field."""
        fields = self._fields(body, COMPLETION)
        prompts = _prompts(fields.get("prompt"), self.tokenizer)
        wanted = None
        if fields.get("logprobs") is not None:
            wanted = _integer(fields, "logprobs", 0, 0, self._top_logprobs)
        return self._call("completion", fields, prompts, "max_tokens", lambda: None, wanted)

    def _fields(self, body: Any, known: set[str]) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise UserError("the body is not a JSON object")
        for name, value in body.items():
            if name in NEUTRAL:
                if value not in NEUTRAL[name]:
                    raise UserError(f"{name} is {value!r}; this server does not do that")
            elif name not in known | COMMON | SAMPLING | LABELS:
                raise UserError(f"unknown field {name!r}")
        model = body.get("model")
        if not isinstance(model, str) or model != self._name:
            raise ModelMissing(f"model {model!r} is not here; there is {self._name!r}")
        return {k: v for k, v in body.items() if v is not None}

    def _call(
        self,
        kind: str,
        fields: Mapping[str, Any],
        prompts: Sequence[Sequence[int]],
        limit: str,
        constraint: Any,
        top_logprobs: int | None,
    ) -> Call:
        n = _integer(fields, "n", 1, 1, MAX_CHOICES)
        if n * len(prompts) > MAX_CHOICES:
            raise UserError(f"{n} choices of {len(prompts)} prompts; at most {MAX_CHOICES} in all")
        stop = _stops(fields.get("stop"))
        default = 16 if kind == "completion" else self._max_tokens
        asked = _integer(fields, limit, 0, 1, self._max_tokens)
        numbers: dict[str, Any] = {
            name: _number(fields, name) for name in SAMPLING if name in fields
        }
        if "top_k" in numbers:
            numbers["top_k"] = int(numbers["top_k"])
        seed = _integer(fields, "seed", time.time_ns() % 2**32, -(2**63), 2**63 - 1) % 2**32
        requests: list[Request] = []
        for prompt in prompts:
            room = self._max_length - len(prompt)
            for _ in range(n):
                requests.append(
                    Request(
                        prompt=prompt,
                        max_new_tokens=asked or max(1, min(default, room)),
                        sampling=Sampling(**numbers),
                        seed=seed,
                        row=len(requests),
                        stop_ids=(self.tokenizer.eos_id, self.tokenizer.im_end_id),
                        stop=stop,
                        constraint=constraint(),
                    )
                )
        options = fields.get("stream_options") or {}
        if not isinstance(options, dict) or options.keys() - {"include_usage"}:
            raise UserError("stream_options takes include_usage")
        return Call(
            kind=kind,
            model=self._name,
            requests=requests,
            stream=_flag(fields, "stream"),
            include_usage=_flag(options, "include_usage"),
            top_logprobs=top_logprobs,
            stop=stop,
            n=n,
        )


class ModelMissing(UserError):
    """The body names a model that is not served."""


class Choice:
    """One choice of an answer while it grows.

    `push` gives the pieces of a stream that an event makes; `whole` the choice of a plain answer.
    """

    def __init__(self, call: Call, index: int, tokenizer: Tokenizer) -> None:
        self._call, self.index, self._tokenizer = call, index, tokenizer
        self._text = TextStream(tokenizer, call.stop)
        self._ids: list[int] = []
        self._content: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._calling = False
        self.finish_reason: str | None = None
        self._tool_calls: list[dict[str, Any]] | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self._ids)

    def push(self, event: Event) -> Iterator[dict[str, Any]]:
        """Entries of `choices` in the stream's chunks."""
        text, new = "", []
        for i, token in enumerate(event.tokens):
            self._ids.append(token)
            if token == self._tokenizer.action_start_id and self._call.kind == "chat":
                self._calling = True
            if not self._calling:
                text += self._text.push(token)
            if self._call.top_logprobs is not None:
                new.append(self._entry(token, event.logprobs[i], event.top[i]))
        if event.finish_reason:
            text += self._text.finish()
            self.finish_reason = event.finish_reason
            self._end()
        self._content.append(text)
        self._entries += new
        if text or new:
            yield self._piece(text, new)
        if event.finish_reason:
            if self._tool_calls:
                calls = [{"index": i, **call} for i, call in enumerate(self._tool_calls)]
                yield {
                    "index": self.index,
                    "delta": {"tool_calls": calls},
                    "logprobs": None,
                    "finish_reason": None,
                }
            last: dict[str, Any] = {"delta": {}} if self._call.kind == "chat" else {"text": ""}
            yield {
                "index": self.index,
                **last,
                "logprobs": None,
                "finish_reason": self.finish_reason,
            }

    def whole(self) -> dict[str, Any]:
        text = "".join(self._content)
        choice: dict[str, Any] = {
            "index": self.index,
            "finish_reason": self.finish_reason,
            "logprobs": self._logprobs(self._entries),
        }
        if self._call.kind == "completion":
            return {**choice, "text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._tool_calls:
            message |= {"tool_calls": self._tool_calls, "content": text or None}
        return {**choice, "message": message}

    def _end(self) -> None:
        """Reads the tool call, when the turn ended with one."""
        if self._call.kind != "chat" or not self._calling:
            return
        answer = chat.parse_response(self._ids, self._tokenizer)
        call = _read_call(answer.tool_call)
        if call is None:
            return  # cut by the length limit; finish_reason says so
        name, arguments = call
        self.finish_reason = "tool_calls"
        self._tool_calls = [
            {
                "id": f"call_{id(self):x}_{self.index}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        ]

    def _piece(self, text: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
        shown = {"delta": {"content": text}} if self._call.kind == "chat" else {"text": text}
        return {
            "index": self.index,
            **shown,
            "logprobs": self._logprobs(entries),
            "finish_reason": None,
        }

    def _entry(self, token: int, logprob: float, top: list[tuple[int, float]]) -> dict[str, Any]:
        wanted = top[: self._call.top_logprobs or 0]
        return {
            **self._named(token, logprob),
            "top_logprobs": [self._named(other, value) for other, value in wanted],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": self._tokenizer.show([token]), "logprob": logprob, "bytes": list(data)}

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self._call.top_logprobs is None:
            return None
        if self._call.kind == "chat":
            return {"content": entries, "refusal": None}
        starts, at = [], 0
        for entry in entries:
            starts.append(at)
            at += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {other["token"]: other["logprob"] for other in entry["top_logprobs"]}
                for entry in entries
            ],
            "text_offset": starts,
        }


def _read_call(call: Mapping[str, str] | None) -> tuple[str, str] | None:
    """Name and arguments (JSON text) of a plugin call."""
    if call is None or call["tool"] != "plugin":
        return None
    body = json.loads(call["content"])
    if not isinstance(body.get("name"), str):
        return None
    return body["name"], json.dumps(body.get("parameters", {}), ensure_ascii=False)


# ------------------------------------------------------------------- parts of a body


def _messages(value: Any) -> list[dict[str, Any]]:
    """Their messages as ours."""
    if not isinstance(value, list) or not value:
        raise UserError("messages is not a list of one or more messages")
    out: list[dict[str, Any]] = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise UserError(f"{where} is not an object")
        role = message.get("role")
        known = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal"}
        if unknown := sorted(message.keys() - known):
            raise UserError(f"{where} has an unknown field {unknown[0]!r}")
        content = _content(message.get("content"), where, empty=role == "assistant")
        if role in ("system", "developer", "user"):
            turn = {"role": "user" if role == "user" else "system", "content": content}
            out.append(turn | ({"name": message["name"]} if message.get("name") else {}))
        elif role == "assistant":
            turn = {"role": "assistant", "content": content}
            out.append(turn | _past_call(message.get("tool_calls"), where))
        elif role == "tool":
            out.append({"role": "environment", "name": "plugin", "content": content})
        else:
            raise UserError(
                f"{where} role is {role!r}; it is system, developer, user, assistant or tool"
            )
    return out


def _content(value: Any, where: str, empty: bool) -> str:
    if value is None and empty:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise UserError(f"{where} content has a part that is not text")
            parts.append(part.get("text"))
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    raise UserError(f"{where} content is not text")


def _past_call(calls: Any, where: str) -> dict[str, Any]:
    if not calls:
        return {}
    if not isinstance(calls, list) or len(calls) != 1:
        raise UserError(f"{where} has several tool_calls; an InternLM2 turn has one")
    try:
        function = calls[0]["function"]
        arguments = json.loads(function["arguments"])
        body = {"name": str(function["name"]), "parameters": arguments}
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{where} tool_calls[0] has no function with JSON arguments") from error
    return {"tool_call": {"tool": "plugin", "content": json.dumps(body, ensure_ascii=False)}}


def _tools(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError("tools is not a list")
    tools = []
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"tools[{i}] is not a function with a name")
        described = {k: function[k] for k in ("name", "description", "parameters") if k in function}
        tools.append(described)
    return tools


def _tool_choice(value: Any, tools: list[dict[str, Any]]) -> str:
    """ "none", "auto", "required", or the name of a tool."""
    if value is None:
        return "auto" if tools else "none"
    if isinstance(value, dict):
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if name not in [tool["name"] for tool in tools]:
            raise UserError(f"tool_choice names {name!r}, which is not among tools")
        return str(name)
    if value not in ("none", "auto", "required"):
        raise UserError(f"tool_choice is {value!r}; it is none, auto, required or a function")
    if value == "required" and not tools:
        raise UserError("tool_choice is required and there are no tools")
    return str(value)


def _schema(value: Any) -> Mapping[str, Any] | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind == "json_schema":
        described = value.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise UserError("response_format json_schema has no schema")
        return schema
    raise UserError("response_format type is text, json_object or json_schema")


def _prompts(value: Any, tokenizer: Tokenizer) -> list[list[int]]:
    def ids(item: Any) -> list[int] | None:
        if isinstance(item, str):
            try:
                return [tokenizer.bos_id, *tokenizer.encode(item)]
            except UserError as error:
                raise UserError(f"prompt: {error}") from error
        whole = isinstance(item, list) and item and all(type(i) is int for i in item)
        return list(item) if whole else None

    single = ids(value)
    if single is not None:
        return [single]
    many = [ids(item) for item in value] if isinstance(value, list) and value else []
    found = [item for item in many if item is not None]
    if not found or len(found) != len(many):
        raise UserError("prompt is a text, a list of ids, or a list of those")
    return found


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise UserError("stop is a text or a list of texts, none empty")
    if len(stops) > 16:
        raise UserError(f"{len(stops)} stop texts; at most 16")
    return tuple(stops)


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} is {value!r}; it must be a number")
    return float(value)


def _integer(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} is {value!r}; it must be a whole number")
    if name in fields and not low <= value <= high:
        raise UserError(f"{name} is {value}; this server takes {low} to {high}")
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it must be true or false")
    return value
