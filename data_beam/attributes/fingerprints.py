"""What de-duplication knows of a document: 312 bytes, made without a look at any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.code import tokens as code_tokens
from data_beam.kernels import minhash
from data_beam.kernels.labels import LABEL_BYTES, label_of, text_hash
from internlm2_jax.errors import UserError

TOKENIZERS = ("words", "code")


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """`label` sorts the better of two copies first (`kernels.labels`); `text_hash` is of the text
    with white space collapsed; `signature` holds `num_perm` compact minima of its n-grams (uint16,
    little-endian; null for a text without words, which can only be an exact copy).

    `tokenizer` "code" reads documents of the source "code" with the width of their indentation
    unified (`code.tokens`; both columns); all others, and with "words" those too, are plain words.
    Band keys are computed from the signature, so the bands are no setting here.
    """

    ngram: int = 5
    num_perm: int = 128
    seed: int = 0
    tokenizer: str = "words"

    name: ClassVar[str] = "fingerprints"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("label", pa.binary(LABEL_BYTES)),
            ("text_hash", pa.binary(16)),
            ("signature", pa.binary()),
        ]
    )

    def __post_init__(self):
        if min(self.ngram, self.num_perm) < 1:
            raise UserError(
                f"ngram {self.ngram} and num_perm {self.num_perm} must be at least 1; the report "
                "uses 5 and 128"
            )
        if self.tokenizer not in TOKENIZERS:
            raise UserError(
                f"tokenizer {self.tokenizer!r} is unknown; choose {' or '.join(TOKENIZERS)}"
            )

    def setup(self) -> None:
        pass

    def _reads_code(self, examined: Examined) -> bool:
        return self.tokenizer == "code" and examined.document.source == "code"

    def words(self, examined: Examined) -> np.ndarray:
        """[W] uint64: the hashed tokens that n-grams are made of."""
        if self._reads_code(examined):
            return code_tokens.tokenize_code(examined.document.text).hashes
        return examined.signals.words.hashes

    def _text_hash(self, examined: Examined) -> bytes:
        if self._reads_code(examined):
            return code_tokens.normalized_hash(examined.document.text)
        return text_hash(examined.document.text)

    def sign(self, batch: Sequence[Examined]) -> tuple[np.ndarray, np.ndarray]:
        """[B, num_perm] uint16 compact signatures, and [B] whether the text has any words."""
        values, offsets = minhash.shingles([self.words(one) for one in batch], self.ngram)
        minima = minhash.signatures(values, offsets, self.num_perm, self.seed)
        return minhash.compact(minima), np.diff(offsets) > 0

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        signatures, signed = self.sign(batch)
        return {
            "label": [label_of(one.document) for one in batch],
            "text_hash": [self._text_hash(one) for one in batch],
            "signature": [
                row.tobytes() if has else None for row, has in zip(signatures, signed, strict=True)
            ],
        }
