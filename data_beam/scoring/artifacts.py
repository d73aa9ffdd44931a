"""The folder of a model, here or in a bucket: what identifies it, and a local copy of it."""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from data_beam.io import storage
from internlm2_jax.errors import UserError

# What a model is made of: the stage's and Hugging Face's files; optimizer states and logs are not.
_FILES = re.compile(
    r"(classifier|model|config)\.json|tokenizer\.model|model\.bin|[^/]*\.safetensors(\.index\.json)?"
)
_PARAMS = re.compile(r"checkpoints/(\d+)/params/.+")


def parts(folder: str | os.PathLike) -> list[str]:
    """The files that make up the model, relative to its folder, sorted: the description, the
    tokenizer, and the parameters of the newest checkpoint. Raises UserError where there are none.
    """
    root = os.fspath(folder).rstrip("/") + "/"
    names = sorted(info.path.removeprefix(root) for info in storage.list_files(folder))
    kept = [name for name in names if _FILES.fullmatch(name)]
    steps = {name: int(match[1]) for name in names if (match := _PARAMS.fullmatch(name))}
    kept += [name for name, step in steps.items() if step == max(steps.values())]
    if not any(name.endswith(".json") for name in kept) or len(kept) < 2:
        raise UserError(
            f"{folder} holds no model; give the folder of a finished stage of a run, or a Hugging "
            "Face folder"
        )
    return kept


def digest(folder: str | os.PathLike) -> str:
    """Hash of the model's content: the same wherever the folder lies. Includes the tokenizer of the
    run, where the stage has none of its own."""
    result = hashlib.blake2b(digest_size=16)
    for name in parts(folder):
        result.update(f"{name}\0{storage.digest(storage.join(folder, name))}\0".encode())
    beside = _tokenizer_beside(folder)
    if beside is not None:
        result.update(storage.digest(beside).encode())
    return result.hexdigest()


def local(folder: str | os.PathLike) -> Path:
    """The folder itself, or a copy of a remote one that lasts as long as the process."""
    if not storage.is_remote(folder):
        return Path(folder)
    copy = Path(tempfile.mkdtemp(prefix="model-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    sources = {name: storage.join(folder, name) for name in parts(folder)}
    beside = _tokenizer_beside(folder)
    if beside is not None:
        sources["tokenizer.model"] = beside
    for name, source in sources.items():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.open_read(source) as reader, open(target, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
    return copy


def _tokenizer_beside(folder: str | os.PathLike) -> str | None:
    """RUN/tokenizer/tokenizer.model of the stage RUN/NAME, as `internlm2_jax.open` finds it."""
    root = os.fspath(folder).rstrip("/")
    if storage.exists(storage.join(root, "tokenizer.model")):
        return None
    if not storage.is_remote(root):
        root = os.path.abspath(root)
    path = storage.join(root.rpartition("/")[0], "tokenizer", "tokenizer.model")
    return path if storage.exists(path) else None
