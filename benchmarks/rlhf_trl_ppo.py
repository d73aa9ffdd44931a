"""TRL's PPO for benchmarks/rlhf.py: a step a line of standard input. In trl 0.23 and before."""

import json
import os
import sys
import tempfile
import time
from types import SimpleNamespace

out = os.fdopen(os.dup(1), "w", buffering=1)  # TRL prints to standard output
os.dup2(2, 1)

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(2048)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words,
    pad_token="w2046",
    eos_token="w2047",
    unk_token="w0",
    padding_side="left",
)
sizes = LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
    tie_word_embeddings=False, pad_token_id=2046, eos_token_id=2047, bos_token_id=1, num_labels=1,
)  # fmt: skip


class Even(torch.nn.Module):
    """A reward model as TRL wants one: the share of even tokens so far, at next to no cost."""

    base_model_prefix = "model"

    def model(self, input_ids, **_):
        share = torch.cumsum((input_ids % 2 == 0).float(), 1)
        share = share / torch.arange(1, input_ids.shape[1] + 1)
        return SimpleNamespace(hidden_states=[share[..., None]])

    def score(self, hidden):
        return hidden


class Turns(TrainerCallback):
    start = 0.0

    def on_train_begin(self, *_, **__):
        if not sys.stdin.readline():
            os._exit(0)
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        out.write(json.dumps({"step": time.perf_counter() - self.start}) + "\n")
        self.on_train_begin()


generator = torch.Generator().manual_seed(0)
rows = torch.randint(3, 2000, (4096, 32), generator=generator).tolist()
data = datasets.Dataset.from_dict({"input_ids": rows})
config = trl.PPOConfig(
    output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, fp16=False, report_to=[],
    per_device_train_batch_size=64, gradient_accumulation_steps=1, num_mini_batches=1,
    num_ppo_epochs=1, local_rollout_forward_batch_size=64, response_length=32, kl_coef=0.04,
    gamma=1.0, lam=0.99, temperature=1.0, learning_rate=1e-6, lr_scheduler_type="constant",
    num_sample_generations=0, total_episodes=64 * 10_000, whiten_rewards=False,
    gradient_checkpointing=False, logging_strategy="no", save_strategy="no", disable_tqdm=True,
)  # fmt: skip
trainer = trl.PPOTrainer(
    args=config, processing_class=tokenizer, model=LlamaForCausalLM(sizes).float(),
    ref_model=LlamaForCausalLM(sizes).float(), reward_model=Even(),
    value_model=LlamaForSequenceClassification(sizes).float(), train_dataset=data,
    eval_dataset=data.select(range(64)), callbacks=[Turns()],
)  # fmt: skip
out.write(f"TRL: {trl.__version__}, torch {torch.__version__}\n")
trainer.train()
