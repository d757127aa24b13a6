"""Documents in files and datasets: read by position, refused by line."""

import functools
import glob
import json
import mmap
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.data import named
from kdjax.data.text.documents import (
  Calls,
  Document,
  Documents,
  check,
  digest,
  joined,
  short,
)
from kdjax.errors import choose
from kdjax.types import UserError

_BLOCK = 1 << 24  # bytes that are searched for lines at once


def read(
  path: str | os.PathLike[str] | Sequence[str],
  *,
  field: str = "text",
  format: str | None = None,
) -> Documents:
  """The documents of files, in the order of the files' names.

  Args:
    path: a file, a folder (the files of one format in it and below), a pattern
      such as `data/*.jsonl`, or a list of these.
    field: which field of a record is the document: a text, or a list of
      messages. Plain text has none.
    format: "jsonl", "parquet" or "text" (each file one document); by default
      what the files' names end in: .jsonl, .json; .parquet; .txt, .md, .py.

  Raises:
    UserError: no such file, files of several formats, an unknown format. At a
      document: bad JSON, a missing field, bytes that are not UTF-8, with the
      file and the line or row.
  """
  paths = [path] if isinstance(path, str | os.PathLike) else list(path)
  files = sorted({f for p in paths for f in _files(pathlib.Path(p))})
  formats = {format} if format else {_SUFFIXES.get(f.suffix) for f in files}
  if len(formats) != 1 or None in formats:
    raise UserError(
      f"{', '.join(map(str, paths))} holds files that end in "
      f"{sorted({f.suffix for f in files})}, needs one format: choose files, "
      f"or say format= one of {', '.join(_FORMATS)}"
    )
  (kind,) = formats
  parts = [
    choose("format of text", str(kind), _FORMATS)(f, field) for f in files
  ]
  return joined(parts, ", ".join(map(str, paths)))


def from_tfds(
  name: str,
  split: str,
  *,
  field: str = "text",
  data_dir: str | os.PathLike[str] | None = None,
) -> Documents:
  """The texts of a TFDS dataset that is already prepared as array_record.

  Arguments and errors as `kdjax.data.load`; `field` is a text feature.
  """
  with named._quiet():
    return from_builder(named._prepared_builder(name, data_dir), split, field)


def from_builder(builder: Any, split: str, field: str = "text") -> Documents:
  """The texts of a TFDS builder whose data is prepared."""
  info = builder.info
  if field not in info.features:
    raise UserError(
      f"{info.name} has the features {', '.join(sorted(info.features))}, needs "
      f"{field!r}: name one of them as the field"
    )
  try:
    examples = builder.as_data_source(split=split)
  except (KeyError, ValueError) as error:
    raise UserError(
      f"{info.name} has no split {split!r}: choose of {', '.join(info.splits)}"
    ) from error
  except NotImplementedError as error:
    raise UserError(
      f"{builder.data_path} is in a format without random access, needs "
      "array_record: prepare it anew with file_format='array_record'"
    ) from error
  where = f"{info.full_name} {split}, example {{}}".format

  def document(index: int) -> Document:
    value = examples[index][field]
    raw = value.encode() if isinstance(value, str) else value
    return _utf8(raw, where(index))

  size = str(len(examples))
  found = digest(info.full_name, split, field, size)
  return Documents(Calls(len(examples), document), info.full_name, where, found)


def _jsonl(path: pathlib.Path, field: str) -> Documents:
  starts, stops, numbers = _lines(path)
  contents = _mapped(path)

  def where(index: int) -> str:
    return f"{path}, line {numbers[index]}"

  def document(index: int) -> Document:
    raw = contents[starts[index] : stops[index]]
    line = _utf8(raw, where(index))
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise UserError(
        f"{where(index)}: not JSON ({error.msg} at column {error.colno}), "
        f"needs one object with {field!r} a line: mend the line"
      ) from error
    return _field(record, field, where(index))

  access = Calls(len(starts), document)
  return Documents(access, str(path), where, _of_file(path, field))


def _lines(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """First byte, end and number (from 1) of each line that is not blank."""
  found, at = [], 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
      found.append(newlines + at)
      at += len(block)
  breaks = np.concatenate([*found, [at]]).astype(np.int64)
  starts = np.concatenate([[0], breaks[:-1] + 1])
  numbers = np.arange(1, len(starts) + 1)
  full = breaks > starts
  contents = _mapped(path)
  for n in np.flatnonzero(breaks - starts == 1):
    full[n] = contents[starts[n]] != ord("\r")  # of CR LF
  return starts[full], breaks[full], numbers[full]


def _mapped(path: pathlib.Path) -> Any:
  if not path.stat().st_size:
    return b""
  with path.open("rb") as file:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _plain(path: pathlib.Path, field: str) -> Documents:
  del field
  access = Calls(1, lambda _: _utf8(path.read_bytes(), str(path)))
  return Documents(access, str(path), lambda _: str(path), _of_file(path))


def _parquet(path: pathlib.Path, field: str) -> Documents:
  try:
    import pyarrow as pa
    import pyarrow.parquet as pq
  except ImportError as error:
    raise UserError(
      f"{path} needs pyarrow to be read: `pip install pyarrow`"
    ) from error
  try:
    file = pq.ParquetFile(path)
  except pa.ArrowInvalid as error:
    raise UserError(
      f"{path} is no parquet file ({error}): copy the file anew"
    ) from error
  if field not in file.schema_arrow.names:
    raise UserError(
      f"{path} has the columns {', '.join(file.schema_arrow.names)}, needs "
      f"{field!r}: name one of them as the field"
    )
  sizes = [
    file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)
  ]
  ends = np.cumsum([0, *sizes])

  # Two groups, so that reading across a boundary reads neither twice.
  @functools.lru_cache(maxsize=2)
  def column(group: int) -> Any:
    return file.read_row_group(group, columns=[field]).column(field)

  def where(index: int) -> str:
    return f"{path}, row {index + 1}"

  def document(index: int) -> Document:
    group = int(np.searchsorted(ends, index, side="right")) - 1
    value = column(group)[index - int(ends[group])].as_py()
    return _field({field: value}, field, where(index))

  access = Calls(int(ends[-1]), document)
  return Documents(access, str(path), where, _of_file(path, field))


_FORMATS = {"jsonl": _jsonl, "parquet": _parquet, "text": _plain}
_SUFFIXES = {
  ".jsonl": "jsonl",
  ".json": "jsonl",
  ".parquet": "parquet",
  ".txt": "text",
  ".md": "text",
  ".py": "text",
}


def _field(record: Any, field: str, where: str) -> Document:
  if not isinstance(record, dict):
    raise UserError(
      f"{where}: the line is {short(record)}, needs an object with {field!r}: "
      "mend the line"
    )
  if record.get(field) is None:
    raise UserError(
      f"{where}: the record has {', '.join(sorted(record)) or 'no fields'}, "
      f"needs {field!r}: mend it, or name another field"
    )
  check(record[field], where)
  return record[field]


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  path = path.expanduser()
  if path.is_file():
    return [path]
  if path.is_dir():
    below = path.rglob("*")
    files = [f for f in below if f.is_file() and f.suffix in _SUFFIXES]
  else:
    files = [pathlib.Path(f) for f in glob.glob(str(path), recursive=True)]
  if not files:
    raise UserError(
      f"{path} holds no file of text, needs one that ends in "
      f"{', '.join(_SUFFIXES)}: check the path"
    )
  return files


def _utf8(raw: bytes, where: str) -> str:
  try:
    return raw.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{where}: byte {error.start} is not UTF-8 ({error.reason}): convert the "
      "file to UTF-8"
    ) from error


def _of_file(path: pathlib.Path, *more: str) -> str:
  found = path.stat()
  return digest(
    str(path.resolve()), str(found.st_size), str(found.st_mtime_ns), *more
  )
