"""lm-evaluation-harness over this project's models: pip install 'internlm2-jax[harness]'.

    python -m internlm2_jax.evals.harness --model internlm2_jax --model_args folder=runs/demo/sft \\
        --tasks mmlu --num_fewshot 5

or, in Python, `lm_eval.simple_evaluate(model=HarnessModel.of(subject), ...)`. On the same items
both give the same score, to the last item (tests/evals/test_harness.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from internlm2_jax.errors import UserError
from internlm2_jax.evals.subject import Subject
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.progress import Progress

_CHAT = "\x00chat\x00"  # before turns as JSON: no text of a user can become a special token
MAX_NEW_TOKENS = 256  # as the harness has it where a task says nothing


@register_model("internlm2_jax")
class HarnessModel(LM):
    """`folder` is what `internlm2_jax.open` takes."""

    def __init__(
        self, folder: str = "", max_length: int | None = None, slots: int = 32, **ignored: Any
    ) -> None:
        super().__init__()
        if not folder:
            return
        import internlm2_jax

        opened = internlm2_jax.open(folder)
        if opened.tokenizer is None:
            raise UserError(f"{folder} has no tokenizer.model; put the model's own beside it")
        self.subject = Subject(
            opened.model, opened.params, opened.tokenizer, max_length=max_length, slots=slots
        )

    @classmethod
    def of(cls, subject: Subject) -> HarnessModel:
        model = cls()
        model.subject = subject
        return model

    # -------------------------------------------------------------------- what the harness asks
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding says it) of each (context, text)."""
        asked = []
        for request in requests:
            context, text = request.args
            tail = self.subject.tokenizer.encode(text)
            if not tail:
                raise UserError("the harness asks for the likelihood of an empty text")
            head, _ = self.subject.cut(self._ids(context), len(tail), "left")
            asked.append((head, [tail]))
        return [found[0] for found in self._likelihoods(asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text, in windows that overlap by one token."""
        asked, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.subject.tokenizer.encode(request.args[0]),
                prefix_token=self.subject.tokenizer.bos_id,
                max_seq_len=self.subject.max_length - 1,
                context_len=1,
            )
            for window in windows:
                head, tail = make_disjoint_window(window)
                asked.append((head, [tail]))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, found in zip(owners, self._likelihoods(asked), strict=True):
            sums[number] += found[0][0]
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers up to the first of the texts in "until"."""
        out: list[str] = [""] * len(requests)
        kinds: dict[Sampling, list[int]] = {}
        settings = [dict(request.args[1]) for request in requests]
        for number, given in enumerate(settings):
            greedy = not given.get("do_sample", given.get("temperature", 0) > 0)
            temperature = 0.0 if greedy else float(given.get("temperature", 1.0))
            kinds.setdefault(Sampling(temperature, top_p=given.get("top_p", 1.0)), []).append(
                number
            )
        for sampling, numbers in kinds.items():
            new = [int(settings[n].get("max_gen_toks", MAX_NEW_TOKENS)) for n in numbers]
            until = [settings[n].get("until") or () for n in numbers]
            stream = self.subject.answers(
                [
                    self.subject.cut(self._ids(requests[n].args[0]), most, "left")[0]
                    for n, most in zip(numbers, new, strict=True)
                ],
                max_new_tokens=new,
                sampling=sampling,
                seeds=[(0, n) for n in numbers],
                stop=[(stop,) if isinstance(stop, str) else tuple(stop) for stop in until],
            )
            with Progress("lm-eval", len(numbers), "answer") as progress:
                for i, said in stream:
                    out[numbers[i]] = said.text
                    progress.update(1)
        return out

    # -------------------------------------------------------------------- conversations
    @property
    def tokenizer_name(self) -> str:
        return f"internlm2_jax {self.subject.tokenizer.sha256[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "internlm2 ChatML"

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as the harness may hold them; `_ids` makes ids of them.

        Errors: UserError for a beginning of an answer, which ChatML turns here cannot have.
        """
        if not add_generation_prompt:
            raise UserError("gen_prefix is not supported with --apply_chat_template; leave it out")
        return _CHAT + json.dumps(chat_history)

    def _ids(self, context: str) -> list[int]:
        if context.startswith(_CHAT):
            return self.subject.encode_chat(json.loads(context.removeprefix(_CHAT)))
        return self.subject.encode(context)

    def _likelihoods(self, asked: Sequence[Any]) -> list[Any]:
        found: list[Any] = [None] * len(asked)
        with Progress("lm-eval", len(asked), "likelihood") as progress:
            for number, likely in self.subject.likelihoods(asked):
                found[number] = likely
                progress.update(1)
        return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
