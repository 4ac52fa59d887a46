"""Rows out of files: JSON lines, JSON lists, parquet, plain or gzipped, one file or a folder of them, one row at a time."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
MAX_ITEM_BYTES = 64 * 2**20  # a longer "row" is a broken file, and would have to be held in memory whole
CHUNK_BYTES = 2**18
PARQUET_BATCH_ROWS = 64
RAW_CHARS = 20_000
AFTER_ITEM = re.compile(r"\s*([,\]])\s*")


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in its source, readable or not."""

    source: str  # file name, or path below the folder
    line: int  # 1-based: the line of a lines file, the item of a list, the row of a parquet file
    value: Any  # the parsed JSON; None when `problem` is set
    problem: str | None  # why it is no JSON
    text: str | None  # the text of the row, where the source is text
    bytes_done: int  # bytes of all files read so far: progress

    def raw(self) -> str:
        """Return the row as text for the quarantine, at most RAW_CHARS long."""
        text = self.text if self.text is not None else json.dumps(self.value, ensure_ascii=True, default=repr)
        return text if len(text) <= RAW_CHARS else f"{text[:RAW_CHARS]}… ({len(text)} characters in all)"


def list_files(source: Path) -> tuple[list[Path], list[str]]:
    """Return the readable files of a source, sorted by path, and the names of those it leaves alone."""
    if source.is_file():
        if not source.name.endswith(SUFFIXES):
            raise ValueError(f"source {source}: got a file of another kind, expected one of {', '.join(SUFFIXES)}")
        return [source], []
    if not source.is_dir():
        raise ValueError(f"source {source}: no such file or folder; check the path")
    found = sorted(path for path in source.rglob("*") if path.is_file())
    taken = [path for path in found if path.name.endswith(SUFFIXES) and not path.name.startswith(".")]
    ignored = [path.relative_to(source).as_posix() for path in found if path not in set(taken)]
    if not taken:
        raise ValueError(f"source {source}: got no file to read among {len(found)}, expected {', '.join(SUFFIXES)}")
    return taken, ignored


def read_source(source: Path) -> Iterator[SourceRow]:
    """Yield every row of a file or a folder in order; a row that is no JSON says so in `problem`.

    Memory is bounded by the longest row. Blank lines are no rows. A file broken as a whole (cut gzip stream, JSON list that
    ends in the middle, unreadable parquet) is a ValueError, since no one can say which rows it lacks.
    """
    files, _ = list_files(source)
    done = 0
    for path in files:
        name = path.name if source.is_file() else path.relative_to(source).as_posix()
        try:
            yield from _read_parquet(path, name, done) if path.suffix == ".parquet" else _read_text(path, name, done)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"source {name}: the gzip stream is broken ({error}); fetch the file again") from error
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
            raise ValueError(f"source {name}: not a readable parquet file ({error}); fetch the file again") from error
        done += path.stat().st_size


def _read_text(path: Path, name: str, done: int) -> Iterator[SourceRow]:
    with path.open("rb") as compressed, _unpack(path, compressed) as stream:
        head = stream.peek(CHUNK_BYTES) if hasattr(stream, "peek") else b""
        is_list = ".jsonl" not in path.name and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        rows = _read_list(stream, name) if is_list else _read_lines(stream, name)
        for line, value, problem, text in rows:
            yield SourceRow(name, line, value, problem, text, done + compressed.tell())


def _unpack(path: Path, compressed: IO[bytes]) -> Any:
    return gzip.open(compressed, "rb") if path.suffix == ".gz" else compressed


def _read_lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, Any, str | None, str | None]]:
    line = 0
    while data := stream.readline(MAX_ITEM_BYTES):
        line += 1
        if len(data) == MAX_ITEM_BYTES and not data.endswith(b"\n"):
            raise ValueError(
                f"source {name}, line {line}: longer than {MAX_ITEM_BYTES} bytes; expected one object a line"
            )
        data = data.removeprefix(b"\xef\xbb\xbf").strip() if line == 1 else data.strip()
        if data:
            yield (line, *_parse(data))


def _parse(data: bytes) -> tuple[Any, str | None, str]:
    text = data.decode("utf-8", errors="backslashreplace")
    try:
        return json.loads(data.decode("utf-8")), None, text
    except RecursionError:
        return None, "nested too deeply", text
    except ValueError as error:  # also bytes that are no UTF-8, and integers of thousands of digits
        return None, str(error), text


def _read_list(stream: IO[bytes], name: str) -> Iterator[tuple[int, Any, str | None, str | None]]:
    """Yield the items of one JSON list. What is read is decoded as far as it is whole, then more is read."""
    decode = codecs.getincrementaldecoder("utf-8-sig")(errors="backslashreplace").decode
    parser = json.JSONDecoder()
    buffer = decode(stream.read(CHUNK_BYTES)).lstrip().removeprefix("[").lstrip()
    closed = buffer.startswith("]")
    at, item, wanted, ended = int(closed), 0, CHUNK_BYTES, False
    while not closed:
        try:
            value, end = parser.raw_decode(buffer, at)
            follows, problem = AFTER_ITEM.match(buffer, end), "no comma or closing bracket"
        except (ValueError, RecursionError) as error:
            follows, problem = None, str(error)
        if follows:
            item += 1
            yield item, value, None, buffer[at:end]
            at, wanted, closed = follows.end(), CHUNK_BYTES, follows[1] == "]"
            continue
        if ended or len(buffer) - at > MAX_ITEM_BYTES:
            raise ValueError(
                f"source {name}: the JSON list breaks after item {item} ({problem}); mend or fetch the file"
            )
        more = stream.read(wanted)
        ended, wanted = not more, 2 * wanted  # doubling keeps a long item from being scanned over and over
        buffer, at = (buffer[at:] + decode(more, ended)).lstrip(), 0
    if (buffer[at:] + decode(stream.read(CHUNK_BYTES))).strip():
        raise ValueError(f"source {name}: text after the end of the JSON list (item {item}); expected one list a file")


def _read_parquet(path: Path, name: str, done: int) -> Iterator[SourceRow]:
    size = path.stat().st_size
    with pq.ParquetFile(path, pre_buffer=False) as file:
        line, total = 0, file.metadata.num_rows
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, use_threads=False):
            for value in batch.to_pylist():
                line += 1
                yield SourceRow(name, line, value, None, None, done + size * line // total)
