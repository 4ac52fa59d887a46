"""Reading and writing rows files: streamed, atomic, never whole in memory."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS_FILES = ("rows.parquet", "responses.parquet")
BATCH_ROWS = 1024
ROW_GROUP_ROWS = 2048
ROW_GROUP_BYTES = 16 * 2**20


def find_rows_file(folder: Path) -> Path:
    """Return the rows file of an artifact folder."""
    for name in ROWS_FILES:
        if (folder / name).is_file():
            return folder / name
    got = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise ValueError(
        f"rows folder {folder}: got {got}, expected one of {list(ROWS_FILES)}; run ingest or generate first"
    )


def read_rows(
    folder: Path, *, split: str | None = None, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of an artifact folder in file order, at most `batch_rows` at a time, none of them empty.

    `split` keeps the rows of that split alone; `columns` reads no others. Batch borders are the same on every call with the
    same arguments, so a batch's number names a resumable part of the work.
    """
    wanted = None if columns is None else list(columns)
    needed = wanted if wanted is None or split is None or "split" in wanted else [*wanted, "split"]
    with pq.ParquetFile(find_rows_file(folder), pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=batch_rows, columns=needed, use_threads=False):
            kept = batch if split is None else batch.filter(pc.equal(batch.column("split"), split))
            if kept.num_rows:
                yield kept if wanted is None else kept.select(wanted)


def count_rows(folder: Path) -> int:
    """Return the number of rows of an artifact folder."""
    count: int = pq.ParquetFile(find_rows_file(folder)).metadata.num_rows
    return count


def iterate_rows(
    folder: Path, *, split: str | None = None, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of an artifact folder in file order, one by one; `split` and `columns` as in `read_rows`."""
    for batch in read_rows(folder, split=split, columns=columns):
        yield from batch.to_pylist()


class RowsWriter:
    """A parquet file that appears whole or not at all: written under a temporary name, renamed when the block ends well.

    Rows are gathered into row groups of about `ROW_GROUP_ROWS`, fewer when they are long, so that neither a reader nor this
    writer ever holds more than `ROW_GROUP_BYTES` and one batch.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._writer = pq.ParquetWriter(self._partial, schema, compression="zstd")
        self._schema = schema
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = self._waiting_bytes = 0

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows given as dictionaries."""
        self.write_batch(pa.RecordBatch.from_pylist(list(rows), schema=self._schema))

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Append a record batch of the file's schema."""
        self._waiting.append(batch)
        self._waiting_rows += batch.num_rows
        self._waiting_bytes += batch.nbytes
        if self._waiting_rows >= ROW_GROUP_ROWS or self._waiting_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._waiting, schema=self._schema)
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
        self._waiting = []
        self._waiting_rows = self._waiting_bytes = 0

    def __enter__(self) -> "RowsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        with self._partial.open("rb") as written:
            os.fsync(written.fileno())
        self._partial.replace(self._path)


def join_parts(parts: Sequence[Path], target: Path, *, schema: pa.Schema) -> None:
    """Write the columns of `schema` from finished parts in order to `target`, one batch at a time."""
    with RowsWriter(target, schema) as out:
        for part in parts:
            with pq.ParquetFile(part, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=schema.names, use_threads=False):
                    out.write_batch(batch.cast(schema))
