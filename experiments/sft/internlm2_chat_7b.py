"""SFT of InternLM2-7B at 32k tokens: the report's section 4.1 and 4.3.

Needs   : a converted base model and a folder of tokens with books and code:
          internlm2 convert internlm2-7b-base runs/base;  --set base=..., --set tokenizer=...
          --set data=chats.jsonl; 32 or more TPU v5p
Mesh    : fsdp=32
Expect  : never run; a plan for 32 v5p gives 27.8 of 95.7 GiB a chip, 6.8 s a step, 73% of the
          chips' peak at best (fsdp=16,tensor=2: 59%). Plan your own:
          internlm2 plan experiments/sft/internlm2_chat_7b.py --topology v5p:2x4x4 \
              --set base=internlm2_7b
Run     : internlm2 train experiments/sft/internlm2_chat_7b.py --set data=chats.jsonl
"""

from __future__ import annotations

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.models.config import LoRA
from internlm2_jax.stages import Conversations, Pipeline


def experiment(
    base: str = "runs/base",
    tokenizer: str = "runs/tokens",
    data: str = "chats.jsonl",
    layout: str = "fsdp=32",
    lora_rank: int = 0,
    seed: int = 0,
) -> Config:
    """One epoch at 4e-5; a tenth of the rows stays long pre-training data (a choice)."""
    return Config(
        Pipeline,
        sft=Partial(
            stages.sft,
            tokenizer=tokenizer,
            base=base,
            data=Config(Conversations, files=[data]),
            epochs=1.0,
            batch_size=32,
            row_length=32768,
            learning_rate=4e-5,
            warmup=100,
            layout=layout,
            remat="save_qkv",
            pretrain_mixture={"long/books": 0.5, "long/code": 0.5},
            pretrain_share=0.1,
            lora=Config(LoRA, rank=lora_rank, alpha=2.0 * lora_rank) if lora_rank else None,
            seed=seed,
        ),
    )


def tiny(
    base: str = "runs/base", tokenizer: str = "runs/tokens", data: str = "chats.jsonl"
) -> Config:
    """The same on one device, in rows of 512 tokens."""
    config = experiment(base, tokenizer, data, layout="")
    config.sft.row_length, config.sft.batch_size, config.sft.warmup = 512, 4, 1
    return config
