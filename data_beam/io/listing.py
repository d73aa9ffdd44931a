"""Which files a job reads: what patterns match or a folder holds, and choosing up to a number of
bytes.

The choice looks at a hash of each file's name, never at the order of listing, so it is the same on
every file system.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data_beam.io import storage
from data_beam.io.file_ref import FileRef, file_ref, hidden, is_data, portable_name
from data_beam.io.options import ReadOptions
from internlm2_jax.errors import UserError


def _with_repos(
    files: Iterable[FileRef], git_folders: Iterable[str], depth: int
) -> Iterator[FileRef]:
    """Names the repository of each file of code: the nearest folder above it that holds .git, else
    the folder `depth` levels below the root, else the root itself."""
    known = set(git_folders)
    for file in files:
        if file.source != "code" or file.kind != "plain":
            yield file
            continue
        folders = file.path.split("/")[:-1]
        parts = min(depth, len(folders))
        for length in range(len(folders), -1, -1):
            if "/".join(folders[:length]) in known:
                parts = length
                break
        repo = "/".join(folders[:parts]) or file.root
        yield file._replace(repo=repo, repo_parts=parts)


# --- folders ----------------------------------------------------------------------------------


def walk(
    base: Path, skip: Callable[[str, str], bool], strict: bool = False
) -> Iterator[tuple[str, os.stat_result]]:
    """Relative paths of the regular files below `base`; folders for which `skip(relative path,
    name)` holds are not entered.

    Links to folders are not followed, links to files only when the file holds records, pages or an
    archive (download caches are made of such links; in a repository they are copies, or lead out of
    it). A folder that cannot be listed is a UserError when `strict`, else left out.
    """
    stack = [""]
    while stack:
        folder = stack.pop()
        try:
            entries = list(os.scandir(base / folder))
        except OSError as error:
            if strict:
                raise UserError(f"cannot list {base / folder}: {error.strerror}; mend its access "
                                "or exclude it") from error  # fmt: skip
            continue
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not skip(relative, entry.name):
                        stack.append(relative)
                elif entry.is_file(follow_symlinks=False):
                    yield relative, entry.stat(follow_symlinks=False)
                elif entry.is_symlink() and entry.is_file() and is_data(entry.name):
                    yield relative, entry.stat()
            except OSError:
                continue  # gone since


def _list_below(
    base: Path, root: str, exclude: Iterable[str | os.PathLike], options: ReadOptions | None,
    strict: bool = False,
) -> list[FileRef]:  # fmt: skip
    """Every file below a local folder but hidden ones, byte code and what lies below `exclude`."""
    excluded = {os.path.realpath(path) for path in exclude}
    git_folders = []

    def skip(relative: str, name: str) -> bool:
        if name == ".git":
            git_folders.append(relative.rpartition("/")[0])
        return hidden(name) or os.path.realpath(os.path.join(base, relative)) in excluded

    files = []
    for path, stat in walk(base, skip, strict):
        name = path.rsplit("/", 1)[-1]
        if name == ".git":  # of a submodule
            git_folders.append(path.rpartition("/")[0])
        if not hidden(name) and os.path.join(base, path) not in excluded:
            version = str(stat.st_mtime_ns)
            files.append(file_ref(root, str(base), path, stat.st_size, version, options))
    depth = 1 if options is None else options.repo_depth
    return list(_with_repos(files, git_folders, depth))


def list_folder(folder: Path, exclude: Iterable[Path] = ()) -> list[FileRef]:
    """Every file below `folder` but hidden ones, byte code and what lies below `exclude`.

    A folder that is missing, or holds no file, is a UserError.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"corpus folder {folder} {state}; give a folder with text or code files")
    files = _list_below(folder.resolve(), "corpus", exclude, None)
    if not files:
        raise UserError(f"corpus folder {folder} holds no files; give one with text or code files")
    return files


# --- patterns ---------------------------------------------------------------------------------


def list_inputs(
    patterns: str | Sequence[str],
    options: ReadOptions | None = None,
    output: str | os.PathLike | None = None,
) -> list[FileRef]:
    """The files that `--input` names, sorted, each once; large ones in pieces. What lies below
    `output` is the job's own and no input.

    A pattern is a file, a folder (everything below it; of a corpus its documents) or a glob (`**`
    crosses folders), local or remote ("gs://bucket/crawl/*.warc.gz"); several may stand in one
    text, parted by commas. One that matches nothing is a UserError.
    """
    options = options or ReadOptions()
    if output is not None:
        options = dataclasses.replace(options, exclude=(*options.exclude, os.fspath(output)))
    found: dict[str, FileRef] = {}
    for pattern in _split([patterns] if isinstance(patterns, str) else patterns):
        matched = (_list_remote if storage.is_remote(pattern) else _list_local)(pattern, options)
        if not matched:
            raise UserError(f"input {pattern!r} matches no file; check the path or the pattern")
        for file in matched:
            found.setdefault(file.location, file)
    pieces = [piece for file in found.values() for piece in split(file, options.piece_bytes)]
    return sorted(pieces, key=lambda file: (file.root, file.location, file.start))


def _split(patterns: Sequence[str]) -> list[str]:
    """Commas part patterns, unless a file has that very name."""
    parts: list[str] = []
    for text in patterns:
        whole = not storage.is_remote(text) and os.path.lexists(text)
        parts += [text] if whole else [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError("no input is given; name a file, a folder or a pattern with --input")
    return parts


def _fixed_folder(pattern: str) -> str:
    """The folder above the first part of a glob that holds a magic character."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:first])


def _list_local(pattern: str, options: ReadOptions) -> list[FileRef]:
    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isdir(path):
        name = os.path.basename(path) or "input"
        if os.path.isfile(os.path.join(path, "manifest.json")) and (shards := _shards_of(path)):
            return [file for shard in shards
                    for file in _list_local(os.path.join(path, shard), options)]  # fmt: skip
        return _list_below(Path(path), portable_name(name), options.exclude, options, strict=True)
    if os.path.isfile(path):
        base, name = os.path.split(path)
        stat = os.stat(path)
        root = portable_name(os.path.basename(base) or "input")
        file = file_ref(root, base, name, stat.st_size, str(stat.st_mtime_ns), options)
        return list(_with_repos([file], (), options.repo_depth))
    if not glob.has_magic(path):
        raise UserError(f"input {pattern!r} does not exist; check the path")
    base = _fixed_folder(path) or "/"
    if not os.path.isdir(base):
        raise UserError(f"input {pattern!r}: there is no folder {base}; check the pattern")
    matches = glob_regex(path[len(base.rstrip("/")) + 1 :])
    root = portable_name(os.path.basename(base) or "input")
    below = _list_below(Path(base), root, options.exclude, options, strict=True)
    return [file for file in below if matches.fullmatch(os.fspath(file.path))]


def _shards_of(folder: str) -> list[str]:
    """The shards of a corpus that one of our jobs wrote, which are all that is text in its folder;
    [] for another folder."""
    try:
        manifest = storage.read_json(storage.join(folder, "manifest.json"))
    except UserError:  # somebody's own file of that name
        return []
    if not isinstance(manifest, dict) or manifest.get("kind") not in ("corpus", "documents"):
        return []
    return [row["name"] for row in manifest["shards"]]


def _list_remote(pattern: str, options: ReadOptions) -> list[FileRef]:
    try:
        infos = storage.list_files(pattern)
    except (OSError, ValueError, ImportError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"cannot list {pattern}: {line}; check the path and access") from error
    names = [info.path for info in infos]
    single = names == [pattern]
    base = pattern.rpartition("/")[0] if single else pattern.rstrip("/")
    base = _fixed_folder(base) if glob.has_magic(base) and not single else base
    root = base.rpartition("/")[2]
    if f"{base}/manifest.json" in names and (shards := set(_shards_of(base))):
        infos = [info for info in infos if info.path[len(base) + 1 :] in shards]
    git_folders, files = set(), []
    ours = tuple(f"{name.rstrip('/')}/" for name in options.exclude if storage.is_remote(name))
    for info in infos:
        path = info.path[len(base) + 1 :]
        above, git, _ = f"/{path}".partition("/.git/")
        if git:
            git_folders.add(above.strip("/"))
        if path and not path.endswith("/") and not hidden(path) and not info.path.startswith(ours):
            files.append(file_ref(root, base, path, info.size, info.version, options))
    return list(_with_repos(files, git_folders, options.repo_depth))


def glob_regex(pattern: str) -> re.Pattern[str]:
    """A relative glob as a regular expression: `*` and `?` stay inside a folder, `**` crosses."""
    out, i = [], 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out.append("(?:.*/)?")
            i += 3
        elif pattern.startswith("**", i):
            out.append(".*")
            i += 2
        elif pattern[i] == "*":
            out.append("[^/]*")
            i += 1
        elif pattern[i] == "?":
            out.append("[^/]")
            i += 1
        elif (
            pattern[i] == "["
            and (end := pattern.find("]", i + 2 + pattern.startswith("[!", i))) > 0
        ):
            inner = pattern[i + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            out.append(f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]")
            i = end + 1
        else:
            out.append(re.escape(pattern[i]))
            i += 1
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as error:  # a range from z to a
        raise UserError(f"{pattern!r} is no pattern of file names: {error}") from error


# --- pieces -----------------------------------------------------------------------------------


def split(file: FileRef, piece_bytes: int) -> list[FileRef]:
    """A large file as pieces of about `piece_bytes` that workers can read apart: ranges of bytes of
    uncompressed JSON lines, row groups of Parquet. Every other file is one piece."""
    if file.end:
        return [file]
    if file.kind == "records" and file.path.lower().endswith((".jsonl", ".ndjson")):
        bounds = [*range(0, file.size, piece_bytes), file.size]
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
    elif file.kind == "parquet" and file.size > piece_bytes:
        bounds, sizes = _row_groups(file, piece_bytes)
    else:
        return [file]
    if len(sizes) < 2:
        return [file]
    return [
        file._replace(start=start, end=end, size=size)
        for start, end, size in zip(bounds, bounds[1:], sizes, strict=False)
    ]


def _row_groups(file: FileRef, piece_bytes: int) -> tuple[list[int], list[int]]:
    """Bounds of groups of row groups, and their bytes. A damaged file is left whole: its reader
    says what is wrong with it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bounds, sizes = [0], []
    try:
        with storage.open_read(file.location) as handle:
            metadata = pq.ParquetFile(handle).metadata
            total = 0
            for index in range(metadata.num_row_groups):
                total += metadata.row_group(index).total_byte_size
                if total >= piece_bytes or index == metadata.num_row_groups - 1:
                    bounds.append(index + 1)
                    sizes.append(total)
                    total = 0
    except (pa.ArrowException, OSError):
        return [0], []
    return bounds, sizes


# --- choosing ---------------------------------------------------------------------------------


def fair_shares(budget: int, available: Mapping[str, int]) -> dict[str, int]:
    """Divides `budget` evenly; what one part has too little of goes to the others."""
    shares: dict[str, int] = {}
    left, parts = budget, sorted(available, key=lambda name: (available[name], name))
    for position, name in enumerate(parts):
        shares[name] = min(available[name], left // (len(parts) - position))
        left -= shares[name]
    return shares


def take(files: Iterable[FileRef], budget: int, seed: int) -> list[FileRef]:
    """Files in the order of their hash until `budget` bytes are reached; one at least."""
    chosen: list[FileRef] = []
    total = 0
    for file in sorted(files, key=lambda file: (file.rank(seed), file.root, file.path)):
        if chosen and total + file.size > budget:
            continue
        chosen.append(file)
        total += file.size
        if total >= budget:
            break
    return chosen


def select(files: Iterable[FileRef], max_bytes: int | None, seed: int) -> list[FileRef]:
    """At most about `max_bytes` of text (None = all), half code and half text if there is enough of
    both, the text divided evenly between its kinds. Sorted by root and path."""
    files = list(files)
    if max_bytes is None:
        return sorted(files)
    by_source: dict[str, dict[str, list[FileRef]]] = {}
    for file in files:
        by_source.setdefault(file.source, {}).setdefault(file.kind, []).append(file)

    def size_of(group: Iterable[FileRef]) -> int:
        return sum(file.size for file in group)

    budgets = fair_shares(
        max_bytes, {s: sum(map(size_of, kinds.values())) for s, kinds in by_source.items()}
    )
    chosen: list[FileRef] = []
    for source, kinds in by_source.items():
        shares = fair_shares(budgets[source], {k: size_of(group) for k, group in kinds.items()})
        for kind, group in kinds.items():
            chosen += take(group, shares[kind], seed)
    return sorted(chosen)
