"""Conversations as ids: InternLM2's ChatML with its environment role, plugins and interpreter.

A turn is `<|im_start|>ROLE[ name=NAME]\\nCONTENT<|im_end|>\\n`. An assistant turn may end in a
call, `<|action_start|><|plugin|>\\nJSON<|action_end|>` or `<|action_start|><|interpreter|>\\n` with
a fenced code block and `<|action_end|>\\n`; an environment turn of the same name answers it (the
public chat format, chat/chat_format.md of InternLM/InternLM).

Structure comes from the fields of a message, never from its text: a text that spells a special
token stays text, so no user can end a turn or forge a tool's answer.

    {"role": "user", "content": "..."}                       system, user, environment: also "name"
    {"role": "assistant", "content": "...",
     "tool_call": {"tool": "plugin", "content": "{...}"},    or "interpreter"
     "loss": false}                                          context only: not to be learnt
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError

ROLES = ("system", "user", "assistant", "environment")
TOOLS = ("plugin", "interpreter")
Message = Mapping[str, Any]
Learn = Literal["all", "last"]


class Rendered(NamedTuple):
    """`ids`, and for each whether the model is to learn it: the assistant's own tokens."""

    ids: list[int]
    loss_mask: list[bool]


class Response(NamedTuple):
    """What a model said. `tool_call` is as in a message; `finished` says that the turn was ended.

    `problem` says what is wrong with a call that cannot be carried out; `tool_call` is None then.
    """

    content: str
    tool_call: dict[str, str] | None
    finished: bool
    problem: str | None

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message that goes into the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        return message | ({"tool_call": self.tool_call} if self.tool_call else {})


def check(messages: Sequence[Message]) -> None:
    """UserError unless `messages` can be rendered; it names the first bad one and the field."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise UserError("a conversation is a list of one or more messages; got none")
    for index, message in enumerate(messages):
        _check(message, index)


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    learn: Learn = "all",
) -> Rendered:
    """Ids of a conversation, bos first, and its loss mask.

    The mask is true for what the assistant writes: its content, its tool call and the closing
    `<|im_end|>`; not in turns with "loss": false and, with `learn="last"`, only in the last answer
    of the conversation. With `add_generation_prompt` the ids end where the assistant is to begin.
    The assistant's header is encoded apart from its content, so what is trained on is, token for
    token, what generation sees. A bad message is a UserError that names its index and field.
    """
    check(messages)
    if learn not in get_args(Learn):
        raise UserError(f"learn is {learn!r}; it is one of {', '.join(get_args(Learn))}")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    skipped = answers[:-1] if learn == "last" else []
    ids, mask = [tokenizer.bos_id], [False]

    def add(new: list[int], learnt: bool) -> None:
        ids.extend(new)
        mask.extend([learnt] * len(new))

    newline = tokenizer.encode("\n")
    for index, message in enumerate(messages):
        add([tokenizer.im_start_id], False)
        if message["role"] == "assistant":
            add(tokenizer.encode("assistant\n"), False)
            learnt = message.get("loss", True) and index not in skipped
            add([*_assistant(message, tokenizer), tokenizer.im_end_id], learnt)
        else:
            add([*_other(message, tokenizer), tokenizer.im_end_id], False)
        add(newline, False)
    if add_generation_prompt:
        add([tokenizer.im_start_id, *tokenizer.encode("assistant\n")], False)
    return Rendered(ids, mask)


def reward_input(
    domain_system_prompt: str, messages: Sequence[Message], tokenizer: Tokenizer
) -> list[int]:
    """Ids for the conditional reward model, ending in the reward token, whose output is the score.

    The domain's system prompt comes first and goes to the reward model alone (report section
    4.2.1); an empty one is left out, which gives the input of the published reward models.
    """
    domain = [{"role": "system", "content": domain_system_prompt}] if domain_system_prompt else []
    return [*render([*domain, *messages], tokenizer).ids, tokenizer.reward_id]


def parse_response(ids: Iterable[int], tokenizer: Tokenizer) -> Response:
    """Splits a model's ids into its text and its tool call; never raises.

    The turn ends at the first `<|im_end|>` or eos. A call is well formed if it names a tool, is
    closed, and, for a plugin, is one JSON object; text after it does not count.
    """
    ids = [int(i) for i in ids]
    stop = next(
        (n for n, i in enumerate(ids) if i in (tokenizer.im_end_id, tokenizer.eos_id)), None
    )
    ids, finished = ids[:stop], stop is not None
    if tokenizer.action_start_id not in ids:
        return Response(tokenizer.decode(ids), None, finished, None)
    start = ids.index(tokenizer.action_start_id)
    content, call = tokenizer.decode(ids[:start]), ids[start + 1 :]
    tools = {tokenizer.plugin_id: "plugin", tokenizer.interpreter_id: "interpreter"}
    if not call or call[0] not in tools:
        return Response(content, None, finished, "the call names neither plugin nor interpreter")
    if tokenizer.action_end_id not in call:
        return Response(content, None, finished, "the call is not closed")
    body = tokenizer.decode(call[1 : call.index(tokenizer.action_end_id)]).removeprefix("\n")
    tool = tools[call[0]]
    if tool == "plugin" and not _is_json_object(body):
        return Response(content, None, finished, "the plugin call is not one JSON object")
    return Response(content, {"tool": tool, "content": body}, finished, None)


def _assistant(message: Message, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(message["content"])
    if call := message.get("tool_call"):
        ids += [tokenizer.action_start_id, _tool_id(call["tool"], tokenizer)]
        ids += [*tokenizer.encode("\n" + call["content"]), tokenizer.action_end_id]
        if call["tool"] == "interpreter":
            ids += tokenizer.encode("\n")
    return ids


def _other(message: Message, tokenizer: Tokenizer) -> list[int]:
    role, name, content = message["role"], message.get("name"), message["content"]
    if name in TOOLS:
        header = [*tokenizer.encode(f"{role} name="), _tool_id(name, tokenizer)]
        return [*header, *tokenizer.encode("\n" + content)]
    return tokenizer.encode(f"{role} name={name}\n{content}" if name else f"{role}\n{content}")


def _tool_id(tool: str, tokenizer: Tokenizer) -> int:
    return tokenizer.plugin_id if tool == "plugin" else tokenizer.interpreter_id


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check(message: Message, index: int) -> None:
    """UserError unless `message` is one; names the index, the field and the mend."""

    def fail(what: str) -> UserError:
        return UserError(f"messages[{index}] {what}")

    def text(value: Any, field: str) -> None:
        if not isinstance(value, str):
            raise fail(f"{field} is {type(value).__name__}; it must be text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise fail(f"{field} has a lone surrogate at character {error.start}") from error

    def fields(value: Any, where: str, required: set[str], optional: set[str]) -> None:
        if not isinstance(value, Mapping):
            raise fail(f"{where}is {type(value).__name__}; it must be an object")
        if missing := sorted(required - value.keys()):
            raise fail(f"{where}has no {missing[0]!r}")
        if unknown := sorted(map(str, value.keys() - required - optional)):
            known = ", ".join(sorted(required | optional))
            raise fail(f"{where}has an unknown field {unknown[0]!r}; it takes {known}")

    fields(message, "", {"role", "content"}, {"name", "tool_call", "loss"})
    role, name, call = message["role"], message.get("name"), message.get("tool_call")
    if "loss" in message and (role != "assistant" or not isinstance(message["loss"], bool)):
        raise fail("loss must be true or false, and belongs to an assistant")
    if role not in ROLES:
        raise fail(f"role is {role!r}; it is one of {', '.join(ROLES)}")
    text(message["content"], "content")
    if name is not None:
        text(name, "name")
        if role == "assistant" or not name or "\n" in name:
            raise fail("name must be one line of text, and an assistant has none")
    if call is not None:
        if role != "assistant":
            raise fail(f"tool_call belongs to an assistant, not to role {role!r}")
        fields(call, "tool_call ", {"tool", "content"}, set())
        if call["tool"] not in TOOLS:
            raise fail(f"tool_call tool is {call['tool']!r}; it is plugin or interpreter")
        text(call["content"], "tool_call content")
