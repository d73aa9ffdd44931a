"""`internlm2 generate`, `internlm2 chat` and `internlm2 serve`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from internlm2_jax.errors import UserError

# Interpreter calls that are carried out between two lines of the person.
MOST_CALLS = 8
HELP = """/system TEXT   begin anew with this system prompt
/tools FILE    JSON list of tools the model may call: {"name", "description", "parameters"}
/reset         begin anew
/undo          take back the last question and its answer
/quit          leave"""


weights_option = click.option(
    "--weights", default="auto", show_default=True, help="auto (as they are), int8 or int4."
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--chat", is_flag=True, help="Put PROMPT into a ChatML user turn.")
@weights_option
def generate(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    weights: str,
) -> None:
    """Continue PROMPT with the model in FOLDER (Hugging Face or a stage of a run)."""
    import internlm2_jax

    model = internlm2_jax.open(folder)
    question = [{"role": "user", "content": prompt}] if chat else prompt
    click.echo(
        model.generate(
            question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            weights=weights,
        )
    )


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the engine that chat and serve share."""
    for option in (
        click.option(
            "--max-length", type=int, help="Tokens of a conversation; default: the model's."
        ),
        click.option("--cache", default="auto", show_default=True, help="auto, bfloat16 or int8."),
        weights_option,
    ):
        function = option(function)
    return function


def _opened(folder: Path) -> tuple[Any, Any]:
    """A language model of `folder`, and its tokenizer."""
    import internlm2_jax

    opened = internlm2_jax.open(folder)
    if opened.tokenizer is None:
        raise UserError(f"{folder} has no tokenizer.model; put the model's own beside it")
    return opened, opened.tokenizer


def _engine(opened: Any, tokenizer: Any, max_length: int | None, **sizes: Any) -> Any:
    """A compiled engine; says how much cache it takes before it takes it."""
    from internlm2_jax.infer.engine import Engine, EngineConfig

    cfg = opened.cfg
    length = max_length or min(cfg.max_position_embeddings, 8192)
    if cfg.length_limit is not None and length > cfg.length_limit:
        raise UserError(f"--max-length {length} passes the model's {cfg.length_limit} positions")
    config = EngineConfig(max_length=length, **sizes)
    click.echo(
        f"{config.slots} slots of up to {length:,} tokens; "
        f"{config.num_pages} pages of {config.page} take "
        f"{config.cache_bytes(cfg) / 2**20:,.1f} MiB",
        err=True,
    )
    engine = Engine(opened.model, opened.params, config, tokenizer)
    started = time.monotonic()
    programs = engine.warm_up()
    click.echo(f"{programs} programs ready in {time.monotonic() - started:.1f} s", err=True)
    return engine


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--system", default="", help="System prompt.")
@click.option("--max-new-tokens", default=512, show_default=True)
@click.option("--temperature", default=0.8, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=0.8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--interpreter", is_flag=True, help="Run the model's Python in the sandbox.")
@engine_options
def chat(
    folder: Path,
    system: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    interpreter: bool,
    max_length: int | None,
    cache: str,
    weights: str,
) -> None:
    """Talk with the model in FOLDER; /help lists what can be typed beside questions.

    When the model calls a tool, its call is shown and your next line is the tool's result. With
    --interpreter its Python runs in the sandbox, and the result is given to it.
    """
    from internlm2_jax.infer.interpreter import Interpreter
    from internlm2_jax.infer.sampling import Sampling

    runs = Interpreter() if interpreter else None  # refused before anything is loaded
    sampling = Sampling(temperature=temperature, top_p=top_p)  # a bad one is told before loading
    opened, tokenizer = _opened(folder)
    sizes = {"slots": 1, "steps": 4, "prefill": ((1, 32), (1, 256)), "cache": cache}
    sizes["weights"] = weights
    engine = _engine(opened, tokenizer, max_length, **sizes)
    talk = Conversation(engine, tokenizer, sampling, max_new_tokens, seed, system, runs)
    while True:
        try:
            line = click.prompt(talk.turn, prompt_suffix="> ", default="", show_default=False)
        except click.Abort:
            click.echo()
            return
        if line.strip() == "/quit":
            return
        try:
            talk.say(line, lambda text: click.echo(text, nl=False))
        except UserError as error:
            click.echo(f"error: {error}", err=True)
        except KeyboardInterrupt:
            click.echo(" (stopped)")


class Conversation:
    """Turns of a chat and the commands between them.

    Attributes: `messages` (data/chat.py), `turn`: who speaks next, "user" or "plugin".
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        sampling: Any,
        max_new_tokens: int,
        seed: int,
        system: str = "",
        interpreter: Any = None,
    ) -> None:
        self._interpreter = interpreter
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._limit, self._seed, self._asked = max_new_tokens, seed, 0
        self._tools: list[dict[str, Any]] = []
        self._grammars: Any = None
        self._system = system
        self._begin()

    def _begin(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.turn = "user"
        if self._system:
            self.messages.append({"role": "system", "content": self._system})
        if self._tools:
            listing = json.dumps(self._tools, ensure_ascii=False)
            self.messages.append({"role": "system", "name": "plugin", "content": listing})
        if self._interpreter:
            from internlm2_jax.infer.interpreter import SYSTEM

            self._interpreter.close()
            self.messages.append({"role": "system", "name": "interpreter", "content": SYSTEM})

    def say(self, line: str, show: Callable[[str], None]) -> None:
        """A line of the person: a command, a question, or a tool's result.

        Args:
          show: is given the answer's text piece by piece.
        Errors: UserError, after which the conversation is as it was.
        """
        name, _, rest = line.strip().partition(" ")
        if not line.strip():
            return
        if name.startswith("/"):
            show(self._command(name, rest.strip()) + "\n")
            return
        turn = {"role": "user", "content": line}
        if self.turn != "user":
            turn = {"role": "environment", "name": self.turn, "content": line}
        before = list(self.messages)
        self.messages.append(turn)
        try:
            self._answer(show)
            for _ in range(MOST_CALLS):
                if self._interpreter is None or self.turn != "interpreter":
                    break
                self._run_call(show)
        except BaseException:
            self.messages = before
            raise

    def _run_call(self, show: Callable[[str], None]) -> None:
        """Carries out the interpreter call at the end, and lets the model go on."""
        told = self._interpreter(self.messages[-1]["tool_call"]["content"])
        show(f"[result] {told}\n")
        self.messages.append({"role": "environment", "name": "interpreter", "content": told})
        self._answer(show)

    def _command(self, name: str, rest: str) -> str:
        if name == "/system":
            self._system = rest
            self._begin()
            return "a new conversation" + (" with this system prompt" if rest else "")
        if name == "/tools":
            self._tools = _read_tools(Path(rest))
            self._begin()
            return f"a new conversation with {len(self._tools)} tools"
        if name == "/reset":
            self._begin()
            return "a new conversation"
        if name == "/undo":
            asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
            self.messages = self.messages[: asked[-1]] if asked else self.messages
            self.turn = "user"
            return "taken back" if asked else "nothing to take back"
        if name == "/help":
            return HELP
        raise UserError(f"no command {name}; /help lists them")

    def _answer(self, show: Callable[[str], None]) -> None:
        from internlm2_jax.data import chat as format
        from internlm2_jax.infer.constrain import Grammars, tool_schemas
        from internlm2_jax.infer.engine import Request
        from internlm2_jax.infer.text import TextStream

        ids = format.render(self.messages, self._tokenizer, add_generation_prompt=True).ids
        room = self._engine.config.max_length - len(ids)
        if room < 1:
            raise UserError("the conversation has filled its --max-length; /reset begins anew")
        constraint = None
        if self._tools:
            size = self._engine.model.cfg.vocab_size
            self._grammars = self._grammars or Grammars(self._tokenizer, size)
            constraint = self._grammars.tool_call(tool_schemas(self._tools))
        self._asked += 1
        number = self._engine.submit(
            Request(
                ids,
                min(self._limit, room),
                self._sampling,
                seed=self._seed,
                row=self._asked,
                stop_ids=(self._tokenizer.eos_id, self._tokenizer.im_end_id),
                constraint=constraint,
            )
        )
        text, said, calling = TextStream(self._tokenizer), [], False
        try:
            while self._engine.busy:
                for event in self._engine.step():
                    for token in event.tokens:
                        said.append(token)
                        calling |= token == self._tokenizer.action_start_id
                        show("" if calling else text.push(token))
        except BaseException:
            if self._engine.busy:
                self._engine.cancel(number)
            raise
        show(text.finish())
        answer = format.parse_response(said, self._tokenizer)
        self.messages.append(answer.message)
        self.turn = "user"
        if answer.tool_call:
            self.turn = answer.tool_call["tool"]
            show(f"\n[{self.turn}] {answer.tool_call['content']}")
        elif answer.problem:
            show(f"\n({answer.problem})")
        show("\n")


def _read_tools(path: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tools in {path}: {error}") from error
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools
    ):
        raise UserError(f"{path}: tools are a JSON list of objects with a name")
    return tools


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="0.0.0.0 is the whole network."
)
@click.option("--port", default=8000, show_default=True)
@click.option("--name", help="The model's name; default: the folder's.")
@click.option(
    "--api-key", envvar="INTERNLM2_API_KEY", help="Clients must send it. [env: INTERNLM2_API_KEY]"
)
@click.option("--slots", default=8, show_default=True, help="Requests decoded together.")
@click.option("--pages", type=int, help="Pages of the cache; default: room for full slots.")
@click.option(
    "--steps", default=8, show_default=True, help="Tokens between two looks at the queue."
)
@click.option("--top-logprobs", default=5, show_default=True, help="The most a client may ask for.")
@click.option("--max-tokens", default=4096, show_default=True, help="Of one answer.")
@click.option(
    "--max-requests", default=256, show_default=True, help="Open at a time; more get 429."
)
@click.option("--max-body", default=2**20, show_default=True, help="Bytes of a request's body.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds of one answer.")
@engine_options
def serve(
    folder: Path,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    slots: int,
    pages: int | None,
    steps: int,
    top_logprobs: int,
    max_tokens: int,
    max_requests: int,
    max_body: int,
    timeout: float,
    max_length: int | None,
    cache: str,
    weights: str,
) -> None:
    """Serve the model in FOLDER over HTTP as OpenAI's API: /v1/chat/completions and the like."""
    try:
        import uvicorn

        from internlm2_jax.infer import server
    except ImportError as error:
        raise UserError(f"internlm2 serve needs {error.name}: pip install -e '.[serve]'") from error
    from internlm2_jax.infer.constrain import Grammars
    from internlm2_jax.infer.openai_api import Reader

    opened, tokenizer = _opened(folder)
    engine = _engine(
        opened,
        tokenizer,
        max_length,
        slots=slots,
        pages=pages,
        steps=steps,
        top_logprobs=top_logprobs,
        cache=cache,
        weights=weights,
        prefill=((1, 32), (1, 256), (slots, 32)),
    )
    name = name or os.path.basename(os.path.abspath(folder))
    reader = Reader(
        tokenizer,
        Grammars(tokenizer, opened.cfg.vocab_size),
        name=name,
        max_length=engine.config.max_length,
        max_tokens=max_tokens,
        top_logprobs=top_logprobs,
    )
    limits = server.Limits(body_bytes=max_body, requests=max_requests, seconds=timeout)
    app = server.application(engine, reader, name=name, limits=limits, api_key=api_key)
    click.echo(f"serving {name} on http://{host}:{port}/v1", err=True)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        **server.UVICORN,
    )
