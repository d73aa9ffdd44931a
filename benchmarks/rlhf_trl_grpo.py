"""TRL's GRPO for benchmarks/rlhf.py: a step a line of standard input."""

import json
import os
import sys
import tempfile
import time

out = os.fdopen(os.dup(1), "w", buffering=1)  # TRL prints to standard output
os.dup2(2, 1)
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(2048)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="w2046", eos_token="w2047", unk_token="w0", bos_token="w1"
)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=False, pad_token_id=2046, eos_token_id=2047, bos_token_id=1,
    )
).float()  # fmt: skip
spent = {"rollout": 0.0, "scoring": 0.0}


def reward(completions, **_):
    start = time.perf_counter()
    scores = []
    for text in completions:
        ids = [int(word[1:]) for word in text.split()]
        scores.append(sum(i % 2 == 0 for i in ids) / max(1, len(ids)))
    spent["scoring"] += time.perf_counter() - start
    return scores


class Turns(TrainerCallback):
    start = 0.0

    def on_step_begin(self, *_, **__):
        if not sys.stdin.readline():
            os._exit(0)
        spent.update(rollout=0.0, scoring=0.0)
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        step = time.perf_counter() - self.start
        rest = step - spent["rollout"] - spent["scoring"]
        out.write(json.dumps({"step": step, **spent, "update": rest}) + "\n")


generator = torch.Generator().manual_seed(0)
rows = torch.randint(3, 2000, (4096, 32), generator=generator).tolist()
data = datasets.Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in rows]})
config = trl.GRPOConfig(
    output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, fp16=False, report_to=[],
    per_device_train_batch_size=64, gradient_accumulation_steps=1, num_generations=8,
    max_completion_length=32, num_iterations=1, beta=0.0, loss_type="dapo", temperature=1.0,
    learning_rate=1e-6, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
    adam_beta2=0.95, gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
    disable_tqdm=True, max_steps=10_000, seed=0, epsilon=0.2, epsilon_high=0.28,
)  # fmt: skip
trainer = trl.GRPOTrainer(
    model=model, reward_funcs=reward, args=config, train_dataset=data,
    processing_class=tokenizer, callbacks=[Turns()],
)  # fmt: skip
generate = trainer._generate


def timed(*args, **options):
    start = time.perf_counter()
    found = generate(*args, **options)
    spent["rollout"] += time.perf_counter() - start
    return found


trainer._generate = timed
out.write(f"TRL: {trl.__version__}, torch {torch.__version__}\n")
trainer.train()
