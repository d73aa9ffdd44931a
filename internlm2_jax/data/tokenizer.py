"""Text <-> ids over a SentencePiece BPE model: InternLM2's own file and the ones trained here.

InternLM2 (report section 3.2.1) uses byte-fallback BPE with an identity normaliser: no text is
lost. Two holes of SentencePiece are closed here so that `decode(encode(text)) == text` always:

* U+2581 is SentencePiece's inner sign for a space. A text that holds the character itself is cut
  there and the character is written as its three byte pieces.
* Special tokens are structure, never text. They are CONTROL pieces, which SentencePiece does not
  match in its input, so a text that spells `<|im_end|>` becomes ordinary pieces. InternLM2's file
  has its 147 spare tokens, six of which are the chat tokens, as USER_DEFINED pieces, which are
  matched; they become CONTROL when it is loaded. The file itself is never changed.

Decoding joins the bytes of the pieces, so a piece may hold any part of a character.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import heapq
import io
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from internlm2_jax.errors import UserError
from internlm2_jax.files import atomic_write

REWARD = "[REWARD]"
PLUGIN, INTERPRETER = "<|plugin|>", "<|interpreter|>"
ACTION_START, ACTION_END = "<|action_start|>", "<|action_end|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
# InternLM2's order, at the end of the vocabulary; its file names them [UNUSED_TOKEN_n].
SPARE_TOKENS = {
    REWARD: "[UNUSED_TOKEN_130]",
    PLUGIN: "[UNUSED_TOKEN_141]",
    INTERPRETER: "[UNUSED_TOKEN_142]",
    ACTION_END: "[UNUSED_TOKEN_143]",
    ACTION_START: "[UNUSED_TOKEN_144]",
    IM_END: "[UNUSED_TOKEN_145]",
    IM_START: "[UNUSED_TOKEN_146]",
}
# SentencePiece learns no piece with a tab (it is its own boundary sign), so runs are given.
TAB_RUNS = tuple("\t" * n for n in range(1, 9))
BYTES_AND_CONTROLS = 259
CHARACTER_COVERAGE = 0.9999  # InternLM2's; what is rarer is spelt in bytes
_SPACE_SIGN = "\u2581"
_REPLACEMENT = "\ufffd".encode()
_CHUNK_CHARACTERS = 8192  # the BPE trainer stops at a word of 65,536 characters
_Piece: Any = sentencepiece_model.ModelProto.SentencePiece


class Tokenizer:
    """A SentencePiece model with its special tokens. Make one with `Tokenizer.load(path)`.

    Attributes: `vocab_size`; `bos_id`, `eos_id`, `pad_id` (= eos, as InternLM2 has it),
    `im_start_id`, `im_end_id`, `action_start_id`, `action_end_id`, `plugin_id`,
    `interpreter_id`, `reward_id`; `special`, name -> id of all of these; `sha256` of the file.
    """

    def __init__(self, model: bytes, name: str = "tokenizer model"):
        """`model` is the content of a `.model` file; `name` is what errors call it."""
        proto = _parse(model, name)
        normalizer = proto.normalizer_spec
        if (
            proto.trainer_spec.model_type != sentencepiece_model.TrainerSpec.BPE
            or not proto.trainer_spec.byte_fallback
            or normalizer.name != "identity"
            or normalizer.add_dummy_prefix
            or normalizer.remove_extra_whitespaces
        ):
            raise UserError(
                f"{name} would lose text: need a BPE model with byte_fallback, the identity "
                "normaliser, no dummy prefix and spaces kept; train one with `internlm2 run`"
            )
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = len(proto.pieces)
        self._names: dict[int, str] = {}
        self._bytes = [self._piece_bytes(i, piece) for i, piece in enumerate(proto.pieces)]
        ids = {text: i for i, text in self._names.items()}
        missing = [text for text, spare in SPARE_TOKENS.items() if not {text, spare} & ids.keys()]
        if missing:
            raise UserError(f"{name} has no {missing[0]} piece; use InternLM2's file or train one")
        chat = {t: ids.get(t, ids.get(spare, -1)) for t, spare in SPARE_TOKENS.items()}
        self._names |= {i: text for text, i in chat.items()}

        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=_without_specials(proto).SerializeToString()
        )
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{name} has no beginning or end of text piece (<s>, </s>)")
        self.pad_id = self.eos_id
        self.special: dict[str, int] = {"<s>": self.bos_id, "</s>": self.eos_id} | chat
        self.reward_id = chat[REWARD]
        self.plugin_id, self.interpreter_id = chat[PLUGIN], chat[INTERPRETER]
        self.action_start_id, self.action_end_id = chat[ACTION_START], chat[ACTION_END]
        self.im_start_id, self.im_end_id = chat[IM_START], chat[IM_END]
        byte_ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _Piece.BYTE}
        self._space_sign_ids = [byte_ids[f"<0x{b:02X}>"] for b in _SPACE_SIGN.encode()]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Reads a `.model` file; a missing or damaged one is a UserError."""
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos; never a special id, whatever the text spells.

        A lone surrogate (a str that UTF-8 cannot hold) is a UserError naming its place.
        """
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on `threads` threads."""
        try:
            encoded = self._processor.encode(texts, num_threads=threads) if texts else []
        except TypeError:
            for number, text in enumerate(texts):
                _require_unicode(text, number)
            raise
        for number, text in enumerate(texts):
            if _SPACE_SIGN in text:
                encoded[number] = self._encode_around_space_signs(text)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out; the exact inverse of `encode`.

        Never raises: bytes that are not UTF-8, and ids outside the vocabulary, become U+FFFD.
        """
        return b"".join(map(self._bytes_of, ids)).decode(errors="replace")

    def show(self, ids: Iterable[int]) -> str:
        """As `decode`, with special tokens spelt by name: for people, not for encoding again."""
        names = self._names
        return b"".join(
            names[i].encode() if i in names else self._bytes_of(i) for i in map(int, ids)
        ).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` adds to a text: none for a special token."""
        return self._bytes_of(token)

    def _bytes_of(self, token: int) -> bytes:
        return self._bytes[token] if 0 <= token < self.vocab_size else _REPLACEMENT

    def _piece_bytes(self, token: int, piece: Any) -> bytes:
        """The bytes `piece` stands for; records the name of one that stands for none."""
        if piece.type == _Piece.BYTE:
            return bytes([int(piece.piece[3:5], 16)])
        if piece.type == _Piece.UNKNOWN:
            return _REPLACEMENT
        if _is_special(piece):
            self._names[token] = piece.piece
            return b""
        return piece.piece.replace(_SPACE_SIGN, " ").encode()

    def _encode_around_space_signs(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._processor.encode(text.split(_SPACE_SIGN), num_threads=1):
            ids += part
            ids += self._space_sign_ids
        return ids[: -len(self._space_sign_ids)]


def train_tokenizer(
    texts: Iterable[str],
    output: str | os.PathLike,
    *,
    vocab_size: int,
    max_bytes: int = 16 * 2**20,
    seed: int = 0,
) -> Tokenizer:
    """Trains InternLM2's kind of tokenizer on `texts` and writes it to `output`, whole or not.

    Settings as in InternLM2's file: BPE, identity normaliser, byte fallback, single digits,
    pieces for runs of spaces, character coverage 0.9999, unk 0, bos 1, eos 2, bytes 3 to 258.
    `vocab_size` counts everything, the 7 chat, tool and reward tokens at its end included. Single
    characters take at most half of the room beside the bytes, so that a small vocabulary over
    Chinese text still has pieces of several; rarer characters are spelt in bytes.

    When the texts exceed `max_bytes` of UTF-8, a uniform sample of whole texts that fits is used,
    chosen by `seed`. The same arguments give the same file, byte for byte. Raises UserError when
    `vocab_size` is too small for the alphabet or too large for the texts.
    """
    model = io.BytesIO()
    sample = _sample(texts, max_bytes, seed)
    reserved = len(SPARE_TOKENS) + len(TAB_RUNS)
    rare = _rare_characters(sample, max(1, (vocab_size - reserved - BYTES_AND_CONTROLS) // 2))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(
                part[start : start + _CHUNK_CHARACTERS]
                for text in sample
                for part in (rare.split(text) if rare else [text])
                for start in range(0, len(part), _CHUNK_CHARACTERS)
            ),
            model_writer=model,
            model_type="bpe",
            vocab_size=max(8, vocab_size - reserved),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            character_coverage=CHARACTER_COVERAGE,
            max_sentence_length=4 * _CHUNK_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size, reserved) from error
    proto = sentencepiece_model.ModelProto.FromString(model.getvalue())
    for run in TAB_RUNS:
        proto.pieces.add(piece=run, score=0.0, type=_Piece.USER_DEFINED)
    for token in SPARE_TOKENS:
        proto.pieces.add(piece=token, score=0.0, type=_Piece.CONTROL)
    proto.trainer_spec.vocab_size = vocab_size
    content = proto.SerializeToString(deterministic=True)
    tokenizer = Tokenizer(content, str(output))
    atomic_write(output, content)
    return tokenizer


def _parse(model: bytes, name: str) -> sentencepiece_model.ModelProto:
    try:
        proto = sentencepiece_model.ModelProto.FromString(model)
    except DecodeError:
        proto = sentencepiece_model.ModelProto()
    if not proto.pieces:
        raise UserError(f"{name} is not a whole SentencePiece model; copy it or train it again")
    return proto


def _is_special(piece: Any) -> bool:
    """True for pieces that stand for structure: control pieces and InternLM2's spare tokens."""
    return piece.type == _Piece.CONTROL or (
        piece.type == _Piece.USER_DEFINED and piece.piece.startswith("[UNUSED_TOKEN_")
    )


def _without_specials(proto: sentencepiece_model.ModelProto) -> sentencepiece_model.ModelProto:
    """A copy whose special tokens cannot be found in text."""
    copy = sentencepiece_model.ModelProto.FromString(proto.SerializeToString())
    for piece in copy.pieces:
        if _is_special(piece):
            piece.type = _Piece.CONTROL
        elif piece.piece == "\0":
            # InternLM2's piece 354. Its own tokenizer writes NUL as the byte piece (id 3), and
            # SentencePiece 0.2.2 refuses the piece; under another name it is out of reach.
            piece.piece, piece.type = "[NUL]", _Piece.CONTROL
    return copy


def _require_unicode(text: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text {number} has a lone surrogate {text[error.start]!r} at character "
            f"{error.start}: it is not Unicode text; read it with errors='replace'"
        ) from error


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """The texts with the smallest hashes of (seed, index) that fit `max_bytes`, in order."""
    kept: list[tuple[int, int, str]] = []  # a heap with the largest hash on top
    total = 0
    for index, text in enumerate(texts):
        _require_unicode(text, index)
        key = hashlib.blake2b(b"%d %d" % (seed, index), digest_size=8).digest()
        heapq.heappush(kept, (-int.from_bytes(key), index, text))
        total += _utf8_bytes(text)
        while total > max_bytes and len(kept) > 1:
            total -= _utf8_bytes(heapq.heappop(kept)[2])
    return [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]


def _rare_characters(sample: Sequence[str], most: int) -> re.Pattern[str] | None:
    """What lies outside the `most` commonest characters of `sample`; None when they are enough.

    SentencePiece gives every character of its coverage a piece and takes no coverage below 0.98.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in sample:
        counts.update(text)
    common = sorted(counts, key=lambda character: (-counts[character], character))
    covered = itertools.accumulate(counts[character] for character in common)
    needed = bisect.bisect_left(list(covered), CHARACTER_COVERAGE * counts.total()) + 1
    if needed <= most:
        return None
    return re.compile("[^" + re.escape("".join(common[:most])) + "]+")


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _training_error(message: str, vocab_size: int, reserved: int) -> UserError:
    """SentencePiece's complaint as one line with the number that would work."""
    if largest := re.search(r"value <= (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too large for this little text; the largest possible "
            f"is {int(largest[1]) + reserved}: lower it or give more text"
        )
    if needed := re.search(r"required_chars\. -?\d+ vs (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size} is too small for the bytes and characters of this text; "
            f"the smallest possible is {int(needed[1]) + reserved}"
        )
    if "sentences_.empty()" in message:
        return UserError("no text to train a tokenizer on: every text is empty")
    return UserError(f"the tokenizer could not be trained: {' '.join(message.split())}")
