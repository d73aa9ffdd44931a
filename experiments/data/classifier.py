"""A text classifier for corpus filtering, by the decoder and by fastText, on one labelled file.

Needs   : nothing; by default the classifier is one of damaged writing, and its passages are what
          every machine has (documentation), or --corpus DIR: real ones, and others with words
          shuffled, dropped, repeated, misread by a scanner, garbled, or between torn markup.
          --set labelled=FILE takes labelled texts of your own (toxicity, advertisements ...: JSON
          lines {"text", "label": 1 = to be dropped}); --set pairs=FILE preference pairs in
          hh-rlhf's format (label 1 = the more harmful answer); --set mail=DIR sorted mail in the
          layout of the SpamAssassin corpus (label 1 = advertisement); --set base_run=RUN starts
          from the pre-trained model of a run and takes its tokenizer
Mesh    : one CPU device
Expect  : damaged writing, 508 held-out passages: AUC 0.902 (fastText, 9 seconds), 0.903 (decoder
          of 1.0M parameters from the demo's pre-training, 6 minutes of CPU). docs/data.md: others
Run     : internlm2 run experiments/data/classifier.py        (the same again resumes or skips)
          internlm2 run experiments/data/classifier.py --set base_run=runs/demo
          internlm2 run experiments/data/classifier.py --tiny
Apply   : python -m data_beam web_text with the folder RUN/classifier or RUN/fasttext, or
          data_beam.scoring.score.Classifier("fluency", "RUN/classifier").run(OUTPUT)
"""

from __future__ import annotations

import functools
from typing import Any

from data_beam.scoring.curves import CutoffRule
from data_beam.scoring.fasttext_model import FastTextTraining
from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Output, Phase, Pipeline
from internlm2_jax.stages.classifier import ClassifierTraining, classifier, fasttext_classifier
from internlm2_jax.stages.labelled import (
    labelled_advertisements,
    labelled_fluency,
    labelled_harm,
)

output = functools.partial(Config, Output)


def experiment(
    seed: int = 0,
    corpus: str | None = None,
    labelled: str | None = None,
    pairs: str | None = None,
    mail: str | None = None,
    base_run: str | None = None,
    preset_name: str = "demo",
) -> Config:
    """Both backends on one labelled file. See the top of this file for the arguments."""
    parts: dict[str, Any] = {}
    if base_run is None or (pairs, mail, labelled) == (None, None, None):
        parts["corpus"] = Partial(
            stages.corpus, files_below=corpus, max_bytes=28_000_000, seed=seed
        )
    if base_run is None:
        parts["tokenizer"] = Partial(
            stages.tokenizer, corpus=output("corpus"), vocab_size=2048, seed=seed
        )
        parts["instructions"] = Partial(
            stages.instructions,
            corpus=output("corpus"),
            sft=400,
            preference_pairs=300,
            prompts=100,
            eval_tasks=20,
            seed=seed,
        )
        parts["pretrain"] = Partial(
            stages.pretrain,
            tokenizer=output("tokenizer"),
            corpus=output("corpus"),
            instructions=output("instructions"),
            model=Config(preset, preset_name),
            phases=[
                Config(
                    Phase,
                    name="text",
                    steps=800,
                    sequence_length=256,
                    batch_size=8,
                    rope_theta=10_000.0,
                    learning_rate=3e-3,
                    warmup=80,
                    final_ratio=0.1,
                    mixture={"text": 1.0},
                )
            ],
            enhancement_tasks=100,
            seed=seed,
        )
        start: dict[str, Any] = {"base": output("pretrain"), "tokenizer": output("tokenizer")}
    else:
        start = {"base": f"{base_run}/pretrain", "tokenizer": f"{base_run}/tokenizer"}
    if pairs is not None:
        parts["labelled"] = Partial(labelled_harm, pairs=pairs)
    elif mail is not None:
        parts["labelled"] = Partial(labelled_advertisements, mail=mail)
    elif labelled is None:
        parts["labelled"] = Partial(
            labelled_fluency, corpus=output("corpus"), per_document=12, seed=seed
        )
    return Config(
        Pipeline,
        **parts,
        fasttext=Partial(
            fasttext_classifier,
            labelled=labelled or output("labelled"),
            training=Config(FastTextTraining, epochs=20, seed=seed),
            cutoff=Config(CutoffRule, precision=0.95),
        ),
        classifier=Partial(
            classifier,
            labelled=labelled or output("labelled"),
            **start,
            training=Config(
                ClassifierTraining,
                steps=300,
                row_length=256,
                batch_size=16,
                learning_rate=1e-3,
                warmup=30,
            ),
            cutoff=Config(CutoffRule, precision=0.95),
            seed=seed,
        ),
    )


def tiny(seed: int = 0, corpus: str | None = None) -> Config:
    """The same, small enough to try every stage in a minute."""
    config = experiment(seed=seed, corpus=corpus, preset_name="tiny")
    config.corpus.max_bytes = 2_000_000
    config.tokenizer.vocab_size = 1024
    phase = config.pretrain.phases[0]
    phase.steps, phase.sequence_length, phase.warmup = 4, 64, 1
    config.pretrain.validation_tokens = 2048
    config.fasttext.training.epochs = 3
    training = config.classifier.training
    training.steps, training.row_length, training.batch_size, training.warmup = 4, 64, 8, 1
    config.classifier.held_out = config.fasttext.held_out = 0.2
    return config
