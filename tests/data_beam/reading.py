"""Small valid files of every kind, and reading them back."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_beam.io import writers
from data_beam.io.listing import list_inputs
from data_beam.io.readers import ReadOptions, read
from data_beam.schema import DeadLetter, Document

FAST = ReadOptions(extractor="resiliparse", extraction_timeout=5)
SENTENCE = "The quick brown fox number {} jumps over the lazy dog while the town is asleep. "


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_file(path: Path, options: ReadOptions = FAST) -> list[Document | DeadLetter]:
    return [item for file in list_inputs(str(path), options) for item in read(file, options)]


def read_data(folder: Path, name: str, data: bytes, options: ReadOptions = FAST):
    return read_file(put(folder, name, data), options)


def documents(items) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


def letters(items) -> list[DeadLetter]:
    return [item for item in items if isinstance(item, DeadLetter)]


def only_letter(items) -> DeadLetter:
    assert len(items) == 1 and isinstance(items[0], DeadLetter), items
    return items[0]


def text(number: int, sentences: int = 4) -> str:
    return "".join(SENTENCE.format(number * 31 + i) for i in range(sentences))


def peak_megabytes() -> int:
    """The most memory this process has held. (ru_maxrss counts that of its parent too.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        pytest.skip("this system does not tell the peak of memory")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def grown_by(script: str) -> tuple[str, int]:
    """What a script, run in a process of its own, sets `result` to, and the megabytes it takes
    beyond those for imports."""
    lines = [
        "from reading import *; from data_beam.io.readers import read",
        "read_data(Path(__import__('tempfile').mkdtemp()), 'b.parquet', parquet(3))",
        "base = peak_megabytes()", script, "print(result, peak_megabytes() - base)",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    result, megabytes = done.stdout.rsplit(" ", 1)
    return result, int(megabytes)


# --- makers -----------------------------------------------------------------------------------


def json_lines(count: int) -> bytes:
    return b"".join(orjson.dumps({"text": text(n), "id": n}) + b"\n" for n in range(count))


def page(number: int) -> bytes:
    body = f"<p>{text(number)}</p>" * 2
    return f"<html><head><title>Page {number}</title></head><body>{body}</body></html>".encode()


def http(body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def warc_record(number: int, block: bytes, kind: str = "response", **more: str) -> bytes:
    types = {"response": "application/http; msgtype=response", "conversion": "text/plain"}
    rows = {
        "WARC-Type": kind, "WARC-Date": f"2023-12-01T00:00:{number % 60:02d}Z",
        "WARC-Record-ID": f"<urn:uuid:{number:08d}-0000-0000-0000-000000000000>",
        "WARC-Target-URI": f"http://example.com/{number}",
        "Content-Type": types.get(kind, "application/warc-fields"),
        "Content-Length": str(len(block)),
        **{name.replace("_", "-"): value for name, value in more.items()},
    }  # fmt: skip
    head = "WARC/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in rows.items())
    return head.encode() + b"\r\n" + block + b"\r\n\r\n"


def warc_records(count: int) -> list[bytes]:
    return [warc_record(n, http(page(n))) for n in range(count)]


def wet_records(count: int) -> list[bytes]:
    return [warc_record(n, text(n).encode(), "conversion") for n in range(count)]


def members(count: int, top: str = "pkg") -> dict[str, bytes]:
    return {f"{top}/src/part{n}.py": f"# {text(n)}\nx = {n}\n".encode() for n in range(count)}


def tar(files: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra or []:
            archive.addfile(info)
    return out.getvalue()


def zip_(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def parquet(count: int, rows_per_group: int = 8, **options) -> bytes:
    out = io.BytesIO()
    rows = {"text": [text(n) for n in range(count)], "id": [str(n) for n in range(count)]}
    settings = {"compression": "zstd", "write_page_checksum": True, **options}
    pq.write_table(pa.table(rows), out, row_group_size=rows_per_group, **settings)
    return out.getvalue()


def array_record(folder: Path, count: int, group: int = 4) -> bytes:
    path = folder / "made.arrayrecord"
    rows = [orjson.dumps({"text": text(n), "id": n}) for n in range(count)]
    writers.write_array_record(path, rows, f"group_size:{group},zstd:3")
    data = path.read_bytes()
    path.unlink()
    return data


def every_kind(folder: Path, count: int = 12) -> dict[str, bytes]:
    """A valid file of each kind with `count` documents (one for single documents)."""
    lines, plain = json_lines(count), text(0).encode()
    repo = tar(members(count))
    return {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.arrayrecord": array_record(folder, count),
        "a.parquet": parquet(count),
        "a.warc": b"".join(warc_records(count)),
        "a.warc.gz": b"".join(gzip.compress(record, mtime=0) for record in warc_records(count)),
        "a.warc.wet.gz": b"".join(gzip.compress(record, mtime=0) for record in wet_records(count)),
        "a.html": page(0),
        "a.txt": plain,
        "a.txt.gz": gzip.compress(plain, mtime=0),
        "pkg.zip": zip_(members(count)),
        "stored.zip": zip_(members(count), zipfile.ZIP_STORED),
        "pkg.tar": repo,
        "pkg.tar.gz": gzip.compress(repo, mtime=0),
        "pkg.tar.zst": zstandard.compress(repo),
        "pkg.tar.xz": lzma.compress(repo),
        "pkg.tar.bz2": bz2.compress(repo),
    }
