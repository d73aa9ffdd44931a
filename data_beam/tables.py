"""Attribute shards on disk: Parquet, one row per document of the document shard, in its order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_beam.io import storage
from data_beam.stage import part_name, read_manifest
from internlm2_jax.errors import UserError

SUFFIX = ".parquet"
_ROW_GROUP = 8192  # rows


def folder_of(output: str | os.PathLike, name: str) -> str:
    return storage.join(output, "attributes", name)


def with_id(schema: pa.Schema) -> pa.Schema:
    return schema.insert(0, pa.field("id", pa.string()))


class Writer:
    """Appends batches of rows to one Parquet file; the same rows give the same bytes."""

    def __init__(self, path: str | os.PathLike, schema: pa.Schema):
        self.schema = with_id(schema)
        self.rows = 0
        self._writer = pq.ParquetWriter(path, self.schema, compression="zstd")
        self._waiting: list[pa.Table] = []

    def write(self, ids: Sequence[str], columns: dict[str, Sequence]) -> None:
        arrays = [pa.array(ids, pa.string())]
        for field in self.schema:
            if field.name != "id":
                arrays.append(pa.array(columns[field.name], field.type))
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self.schema))
        self.rows += len(ids)
        if sum(table.num_rows for table in self._waiting) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
            self._waiting = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


def write_table(path: str | os.PathLike, table: pa.Table) -> None:
    """Writes a whole attribute shard, its `id` column included."""
    with storage.whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_attribute(
    output: str | os.PathLike, name: str, shard: int, columns: Iterable[str] | None = None
) -> pa.Table:
    """Columns (None = all, `id` included) of one shard of the attribute `name`."""
    folder = folder_of(output, name)
    manifest = read_manifest(folder, "attribute")
    path = storage.join(folder, part_name(shard, len(manifest["shards"]), SUFFIX))
    with storage.local_copy(path) as local:
        return read_table(local, columns)


def read_table(path: str | os.PathLike, columns: Iterable[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(Path(path), columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the job again") from error
