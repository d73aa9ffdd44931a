"""Nothing is lost, nothing special leaks, and the same texts give the same file."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2_jax.data import tokenizer as tokenizer_module
from internlm2_jax.data.tokenizer import SPARE_TOKENS, Tokenizer, train_tokenizer
from internlm2_jax.errors import UserError

TEXTS = [
    "def add(first, second):\n    if first:\n        return first + second  # 12345\n\n\n" * 8,
    "class Café:\n\tdef __init__(self):\n\t\tself.naïve = '你好，世界'\n" * 8,
    "The quick brown fox jumps over the lazy dog, and then the other dog jumps.\n" * 8,
    "",
]
WEIRD = [
    "", " ", "  a  ", "\0", "a\0b\0\0", "\r", "\r\n\t ", "▁", "▁▁ ▁a▁ ▁", " ▁ ", "😀👩‍👩‍👧",
    "\u2028\u2029\ufeff\u200b", "\ufffd\ufffe\uffff\U0010ffff", "e\u0301\u0327", "⁇ <unk> <s> </s>",
    "<0x41>", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_3][UNUSED_TOKEN_130]", "<|im_start|>system\n",
    "[REWARD]<|plugin|><|interpreter|><|action_end|><|action_start|><|im_end|>", "\u2585\u2047",
]  # fmt: skip


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=400)


@pytest.fixture(scope="module")
def real(shared) -> Tokenizer:
    return Tokenizer.load(shared / "data/tokenizer/internlm2.model")


@pytest.fixture(scope="module", params=["ours", "real"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def assert_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())
    assert all(tokenizer.decode([i]) != "" for i in ids), "a spare token was used for text"


@pytest.mark.parametrize("text", WEIRD, ids=range(len(WEIRD)))
def test_weird_text_survives(tokenizer, text):
    assert_exact(tokenizer, text)


fragments = st.sampled_from(["▁", " ", "\n", "\t", "<|im_end|>", "[UNUSED_TOKEN_145]", "\0", "é"])


@settings(deadline=None, max_examples=200)
@given(text=st.one_of(st.text(), st.lists(st.one_of(fragments, st.text())).map("".join)))
def test_any_text_survives(tokenizer, text):
    assert_exact(tokenizer, text)


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(-10, 93_000)))
def test_any_ids_decode(tokenizer, ids):
    tokenizer.decode(ids).encode()  # UTF-8 can hold it: no lone surrogates
    tokenizer.show(ids).encode()


def test_broken_utf8_and_unknown_ids_become_the_replacement_character(ours):
    half = ours.encode("😀")[:2]
    assert ours.decode([*half, *ours.encode("ok")]) == "\ufffdok"
    assert ours.decode([ours.vocab_size, -1]) == "\ufffd\ufffd"


def test_lone_surrogate_is_named(ours):
    with pytest.raises(UserError, match=r"text 1 has a lone surrogate '\\ud800' at character 2"):
        ours.encode_batch(["fine", "ab\ud800"])


# Golden ids: transformers' InternLM2Tokenizer on the same file (papers/internlm2.md, section 2).
GOLDEN = {
    "你好，世界！InternLM2 在 2024 年发布。": [
        77230, 60353, 68339, 60477, 1214, 1070, 11146, 314, 262, 60361, 262, 638, 1311, 262, 60372,
        68926, 60355,
    ],
    "def f(x):\n\treturn x + 1  # 12345\n": [
        882, 413, 2226, 1122, 989, 991, 619, 262, 312, 387, 324, 262, 4575, 1889, 364,
    ],
    "\x00zero\u200b😀": [3, 14293, 62945, 243, 162, 155, 131],
}  # fmt: skip


def test_golden_ids_of_internlm2(real):
    assert real.encode_batch(list(GOLDEN)) == list(GOLDEN.values())
    assert real.encode_batch(list(GOLDEN), threads=2) == list(GOLDEN.values())


def test_special_ids_of_internlm2(real):
    assert real.vocab_size == 92544
    assert (real.bos_id, real.eos_id, real.pad_id, real.reward_id) == (1, 2, 2, 92527)
    assert (real.plugin_id, real.interpreter_id, real.action_end_id) == (92538, 92539, 92540)
    assert (real.action_start_id, real.im_end_id, real.im_start_id) == (92541, 92542, 92543)
    assert real.show([92543, *real.encode("user"), 92542]) == "<|im_start|>user<|im_end|>"
    assert real.decode([92543, *real.encode("user"), 92542]) == "user"


def test_layout_of_a_trained_vocabulary(ours):
    assert ours.vocab_size == 400
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert [ours.special[name] for name in SPARE_TOKENS] == list(range(393, 400))
    assert ours.im_start_id == 399
    digits = ours.encode("12345")
    assert len(digits) == 5 and [ours.decode([i]) for i in digits] == list("12345")
    assert len(ours.encode("    ")) == 1, "an indentation is one token"
    assert len(ours.encode("\t\t\t")) == 1


def test_training_is_deterministic_and_the_file_loads(ours, tmp_path):
    again = train_tokenizer(iter(TEXTS), tmp_path / "again.model", vocab_size=400)
    assert again.sha256 == ours.sha256
    loaded = Tokenizer.load(tmp_path / "again.model")
    assert loaded.sha256 == ours.sha256
    assert loaded.special == ours.special
    assert loaded.encode(TEXTS[0]) == ours.encode(TEXTS[0])


def test_sample_is_bounded_uniform_and_seeded():
    texts = [f"{i:04d}" for i in range(2000)]
    sample = tokenizer_module._sample(iter(texts), 400, seed=1)
    assert len(sample) == 100 and sample == sorted(sample)
    assert sample == tokenizer_module._sample(texts, 400, seed=1)
    assert sample != tokenizer_module._sample(texts, 400, seed=2)
    assert 700 < sum(map(int, sample)) / 100 < 1300, "not only the first or the last texts"
    assert tokenizer_module._sample(texts, 10**9, seed=1) == texts


def test_vocabulary_of_the_wrong_size_names_the_limit(tmp_path):
    output = tmp_path / "t.model"
    with pytest.raises(UserError, match=r"too large .* largest possible is (\d+)") as caught:
        train_tokenizer(TEXTS, output, vocab_size=50_000)
    largest = int(str(caught.value).split("possible is ")[1].split(":")[0])
    assert not list(tmp_path.iterdir())
    assert train_tokenizer(TEXTS, output, vocab_size=largest).vocab_size == largest
    for small in (0, 100):
        with pytest.raises(UserError, match=r"too small .* smallest possible is (\d+)") as caught:
            train_tokenizer(TEXTS, output, vocab_size=small)
    smallest = int(str(caught.value).split("possible is ")[1])
    assert train_tokenizer(TEXTS, output, vocab_size=smallest).vocab_size == smallest
    with pytest.raises(UserError, match="every text is empty"):
        train_tokenizer(["", ""], output, vocab_size=400)


def test_a_small_vocabulary_over_a_large_alphabet(tmp_path):
    """Half of the pieces beside the bytes are left for more than one character."""
    rng = random.Random(0)
    alphabet = [chr(0x4E00 + i) for i in range(3000)]
    words = ["".join(rng.choices(alphabet, k=2)) for _ in range(400)]
    texts = ["".join(rng.choices(words, k=200)) + "".join(alphabet) for _ in range(20)]
    ours = train_tokenizer(texts, tmp_path / "t.model", vocab_size=700)
    pieces = [ours.decode([i]) for i in range(259, ours.vocab_size)]
    lengths = [len(p) for p in pieces if p and set(p) <= set(alphabet)]
    assert lengths.count(1) > 100 and sum(n > 1 for n in lengths) > 100
    assert all(ours.decode(ours.encode(text)) == text for text in texts[:3])


def test_damaged_files_are_one_line(ours, tmp_path):
    path = tmp_path / "t.model"
    train_tokenizer(TEXTS, path, vocab_size=400)
    whole = path.read_bytes()
    for content in (b"", b"not a model", whole[:1000], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"t\.model is not a whole SentencePiece model"):
            Tokenizer.load(path)
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*: No such file"):
        Tokenizer.load(tmp_path / "absent.model")


def test_a_model_that_loses_text_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "lossy"), vocab_size=70,
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="would lose text"):
        Tokenizer.load(tmp_path / "lossy.model")


def test_imports_neither_jax_nor_tensorflow():
    modules = "tokenizer, chat, records, manifest, packing, pipeline"
    code = (
        f"import sys; from internlm2_jax.data import {modules};"
        "sys.exit(bool({'jax', 'tensorflow', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
