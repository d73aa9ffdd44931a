"""A tokenizer trained on the corpus, and the corpus as tokens."""

from __future__ import annotations

from pathlib import Path

from internlm2_jax import files
from internlm2_jax.data import documents
from internlm2_jax.data.tokenizer import Tokenizer, train_tokenizer
from internlm2_jax.errors import UserError

EXAMPLES = (
    "def add(a: int, b: int) -> int:\n    return a + b  # 12345",
    "The quick brown fox jumps over the lazy dog.",
    "你好，世界！ naïve café 😀",
)


def tokenizer(
    folder: Path,
    *,
    corpus: Path,
    vocab_size: int = 0,
    model: Path | str | None = None,
    max_bytes: int = 8_000_000,
    seed: int = 0,
) -> None:
    """Trains SentencePiece BPE of `vocab_size` on the training split, at most `max_bytes` of it.

    With `model`, a tokenizer.model or a folder with one, that one is taken and none is trained.
    Leaves tokenizer.model, tokens/ (ArrayRecord and manifest) and result.json in `folder`.
    """
    from data_beam import cache

    if (model is None) == (not vocab_size):
        raise UserError("the tokenizer stage takes vocab_size, to train one, or model: one of them")
    path = folder / "tokenizer.model"
    if model is not None:
        given = Path(model)
        given = given / "tokenizer.model" if given.is_dir() else given
        Tokenizer.load(given)
        files.atomic_write(path, given.read_bytes())
    elif not path.is_file():
        texts = (d.text for d in documents.read(corpus / "corpus", "train"))
        train_tokenizer(texts, path, vocab_size=vocab_size, max_bytes=max_bytes, seed=seed)
    vocabulary = Tokenizer.load(path)
    manifest = cache.run(corpus / "corpus", path, folder / "tokens")
    held_out = manifest["splits"]["validation"]
    files.write_json(
        folder / "result.json",
        {
            "vocab_size": vocabulary.vocab_size,
            "sha256": vocabulary.sha256,
            "tokens": {
                split: {name: entry["tokens"] for name, entry in sources.items()}
                for split, sources in manifest["splits"].items()
            },
            "bytes_per_token": {
                name: entry["bytes"] / entry["tokens"]
                for name, entry in held_out.items()
                if entry["tokens"]
            },
            "examples": [
                {"text": text, "pieces": [_shown(vocabulary, i) for i in vocabulary.encode(text)]}
                for text in EXAMPLES
            ],
        },
    )


def _shown(vocabulary: Tokenizer, token: int) -> str:
    """The text of a piece; a lone byte, which is no text by itself, in hexadecimal."""
    text = vocabulary.decode([token])
    return text if "\ufffd" not in text else f"<{token - 3:02X}>"  # bytes are ids 3 to 258
