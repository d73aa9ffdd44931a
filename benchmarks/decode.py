"""The engine on a CPU beside transformers' Llama on torch: an 88M model, float32.

    python -m venv PEER && PEER/bin/pip install torch transformers
    python benchmarks/decode.py --peer PEER/bin/python [--threads 2]

Both have 12 layers of 768, 12 query and 4 key/value heads of 64, an MLP of 2048, 8,192 pieces. Each
lives in a process of its own; they take turns and the medians' ratio is the result. "decode" goes
on with prompts of 16 tokens for 64 more (greedy, the prompt's reading included, in both), "prefill"
reads one prompt of 2,048 and draws a token. Then continuous batching alone: how many of the rows
that the engine computes are of use when lengths have a long tail.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import click
from turns import ask, compared, in_turns, serve

PROMPT, NEW, LONG = 16, 64, 2048
TASKS = {"decode1": NEW, "decode8": 8 * NEW, "prefill": LONG}
SIZES = {
    "vocab_size": 8192, "num_layers": 12, "embed_dim": 768, "num_heads": 12, "num_kv_heads": 4,
    "head_dim": 64, "mlp_dim": 2048,
}  # fmt: skip

PEER = """
import sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=12, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
    tie_word_embeddings=False)).eval()
PROMPT, NEW, LONG = map(int, sys.argv[2:5])
def go(rows):
    ids = torch.randint(0, 8192, (rows, PROMPT))
    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)
        for _ in range(NEW - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return out.logits.sum().item()
def decode1(): go(1)
def decode8(): go(8)
def prefill():
    with torch.inference_mode():
        ids = torch.randint(0, 8192, (1, LONG))
        model(ids, use_cache=True, logits_to_keep=1).logits.sum().item()
print("torch", torch.__version__, flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    globals()[line.strip()]()
    print(time.perf_counter() - start, flush=True)
"""


def worker(weights: str) -> None:
    """Serves our side: a task's name in, seconds out."""
    import jax
    import numpy as np

    from internlm2_jax.infer.engine import Engine, EngineConfig, Request
    from internlm2_jax.infer.sampling import Sampling
    from internlm2_jax.models.build import build
    from internlm2_jax.models.config import ModelConfig

    cfg = ModelConfig(**SIZES, max_position_embeddings=4096, dtype="float32")  # type: ignore[arg-type]
    model = build(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    random = np.random.default_rng(0)

    def engine(slots: int, length: int, *prefill: tuple[int, int]) -> Engine:
        config = EngineConfig(slots=slots, max_length=length, prefill=prefill, steps=NEW)
        made = Engine(model, params, config)
        made.warm_up()
        return made

    one, eight = engine(1, 128, (1, PROMPT)), engine(8, 128, (8, PROMPT))
    reader = engine(1, LONG + 64, (1, 512))

    def requests(count: int, prompt: int, new: int) -> list[Request]:
        return [Request(random.integers(0, 8192, prompt).tolist(), new) for _ in range(count)]

    def mix() -> None:
        """Log-normal lengths, four times as many requests as slots."""
        config = EngineConfig(slots=8, max_length=512, prefill=((1, 16), (8, 16)), steps=16)
        engine = Engine(model, params, config)
        lengths = np.clip(random.lognormal(3.5, 1.0, 48).astype(int), 1, 400)
        asked = [Request([1] * 8, int(n), Sampling(1.0), row=i) for i, n in enumerate(lengths)]
        for request in asked:
            engine.submit(request)
        while engine.waiting:
            engine.step()
        used = engine.decoded / engine.row_steps
        while engine.busy:
            engine.step()
        end = engine.decoded / engine.row_steps
        print(f"{used:.3f} while any waits, {end:.3f} to the last token", flush=True)

    calls: dict[str, Callable[[], object]] = {
        "decode1": lambda: one.run(requests(1, PROMPT, NEW)),
        "decode8": lambda: eight.run(requests(8, PROMPT, NEW)),
        "prefill": lambda: reader.run(requests(1, LONG, 1)),
    }
    print("jax", jax.__version__, weights, flush=True)
    for line in sys.stdin:
        if line.strip() == "mix":
            mix()
            continue
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


@click.command(help=__doc__)
@click.option("--peer", help="Python of a venv with torch and transformers.")
@click.option("--threads", default=2, help="Cores that each side may use.")
@click.option("--rounds", default=3)
@click.option("--worker", "weights", hidden=True)
def main(peer: str | None, threads: int, rounds: int, weights: str | None) -> None:
    if weights:
        return worker(weights)
    sides = {"ours": serve([sys.executable, __file__, "--worker", "float32"], threads)}
    if peer:
        sizes = list(map(str, (PROMPT, NEW, LONG)))
        sides["transformers"] = serve([peer, "-c", PEER, str(threads), *sizes], threads)
    for what, tokens in TASKS.items():
        times = in_turns(sides, what, rounds)
        click.echo(f"{what}: {compared(times, tokens)}; load {os.getloadavg()[0]:.1f}")
    click.echo(f"rows of use in a long-tailed mix: {ask(sides['ours'], 'mix')}")
    for process in sides.values():
        process.kill()


if __name__ == "__main__":
    main()
