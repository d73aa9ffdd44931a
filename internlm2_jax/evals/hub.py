"""Where a suite's files are: a folder of this machine, or a data set of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from internlm2_jax.errors import UserError
from internlm2_jax.evals.suites import Suite

KINDS = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.ipynb")
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def folder(suite: Suite, data: str | None) -> Path | None:
    """The folder of `data`, or of the suite's own hub id.

    A name that is no folder here and has the form owner/name is fetched, or found in the hub's
    cache. Errors: UserError for neither, or for a hub that cannot be reached.
    """
    if data is None and not suite.hub:
        return None
    name = data or suite.hub
    if Path(name).is_dir():
        return Path(name)
    if not _ID.fullmatch(name):
        raise UserError(f"--data {name} is neither a folder nor a hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"suite {suite.name}: {name} is on the hub, which needs huggingface_hub: "
            "pip install 'internlm2-jax[hub]'; or give a folder with --data"
        ) from error
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(KINDS)))
    except Exception as error:  # the client's transport, and so its errors, change with its version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"suite {suite.name}: {name} cannot be fetched from the hub ({reason}); "
            "give a folder with --data"
        ) from error
