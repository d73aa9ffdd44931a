"""Training and prefill of an 88M model on a CPU, beside transformers' Llama on torch.

    python -m venv PEER && PEER/bin/pip install torch transformers
    python benchmarks/transformers_cpu.py --peer PEER/bin/python [--threads 2]

Both have 12 layers of 768, 12 query and 4 key/value heads of 64, an MLP of 2048, 8,192 pieces,
float32, AdamW with the gradient norm clipped to 1. torch recomputes nothing; our blocks keep what
products give and make what lies between them again (`minimal`), which is faster here. Prefill is a
prompt of one row with its KV cache and the logits of its last token.

Each lives in a process of its own; they take turns (turns.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import click
from turns import compared, in_turns, serve

SHAPES = {"train": (4, 512), "prefill": (1, 2048)}
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
    tie_word_embeddings=False))
tx = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
rows = torch.randint(0, 8192, (4, 513))
prompt = torch.randint(0, 8192, (1, 2048))
def train():
    model.train()
    loss = model(rows[:, :-1], labels=rows[:, :-1]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    tx.step()
    tx.zero_grad()
    return loss.item()
def prefill():
    model.eval()
    with torch.inference_mode():
        return model(prompt, use_cache=True, logits_to_keep=1).logits.sum().item()
"""

SERVE = """
print(torch.__version__ if "torch" in globals() else "", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    globals()[line.strip()]()
    print(time.perf_counter() - start, flush=True)
"""


def worker(attention: str, remat: str) -> None:
    """Serves our side: a line "train" or "prefill" in, seconds out."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from internlm2_jax.infer import cache as kv
    from internlm2_jax.models.build import build
    from internlm2_jax.models.config import ModelConfig
    from internlm2_jax.train import optimizer
    from internlm2_jax.train.objectives import language_model_loss
    from internlm2_jax.train.step import init_state, make_train_step

    cfg = ModelConfig(**SIZES, max_position_embeddings=4096, dtype="float32")
    model = build(cfg, attention=attention)
    random = np.random.default_rng(0)
    count, length = SHAPES["train"]
    rows = random.integers(0, cfg.vocab_size, (count, length + 1)).astype(np.int32)
    batch = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "segment_ids": np.ones_like(rows[:, 1:]),
        "positions": np.tile(np.arange(length, dtype=np.int32), (count, 1)),
        "loss_mask": np.ones(rows[:, 1:].shape, np.float32),
    }
    prompt = random.integers(0, cfg.vocab_size, SHAPES["prefill"]).astype(np.int32)
    tx = optimizer.adamw(1e-4)
    step = make_train_step(language_model_loss(model, remat=remat), tx)  # type: ignore[arg-type]
    state = init_state(model.init(jax.random.key(0)), tx)

    @jax.jit
    def fill(params, tokens):
        count, length = tokens.shape
        lengths = jnp.full(count, length, jnp.int32)
        empty = kv.empty(cfg, length, lengths)
        hidden, cache = model.extend(params, tokens, empty, lengths)
        return model.unembed(params, hidden[:, -1:]), cache

    def train() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        float(metrics["loss"])

    def prefill() -> None:
        jax.block_until_ready(fill(state["params"], prompt))

    print(f"jax {jax.__version__}, {cfg.num_params():,} parameters", flush=True)
    calls: dict[str, Callable[[], None]] = {"train": train, "prefill": prefill}
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


@click.command(help=__doc__)
@click.option("--peer", required=False, help="Python of a venv with torch and transformers.")
@click.option("--threads", default=2, help="Cores that each side may use.")
@click.option("--rounds", default=5)
@click.option("--only", type=click.Choice([*SHAPES]), help="One of the two.")
@click.option("--attention", default="auto", help="Our attention implementation.")
@click.option("--remat", default="minimal", help="What our blocks keep.")
@click.option("--worker", "is_worker", is_flag=True, hidden=True)
def main(
    peer: str | None,
    threads: int,
    rounds: int,
    only: str | None,
    attention: str,
    remat: str,
    is_worker: bool,
) -> None:
    if is_worker:
        return worker(attention, remat)
    if peer is None:
        raise click.UsageError("--peer PYTHON is needed")
    options = ["--attention", attention, "--remat", remat]
    sides = {
        "ours": serve([sys.executable, __file__, "--worker", *options], threads),
        "transformers": serve([peer, "-c", PEER + SERVE, str(threads)], threads),
    }
    click.echo(f"load {os.getloadavg()[0]:.1f}, {threads} threads each")
    for what in [only] if only else SHAPES:
        batch, length = SHAPES[what]
        times = in_turns(sides, what, rounds)
        click.echo(f"{what} {batch} x {length}: {compared(times, batch * length)}")
    for process in sides.values():
        process.kill()


if __name__ == "__main__":
    main()
