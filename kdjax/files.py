"""Files of a run, in a folder or in a bucket: `gs://bucket/runs/digits`.

An object in a bucket is there whole or not at all, and is neither appended to
nor renamed. What looks like a folder is how names begin: it is there as soon as
something is in it, and is not made. What must be appended to is `Staged`.
"""

import contextlib
import errno
import importlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from etils import epath

from kdjax.errors import UserError, in_line

_BUCKET = "gs://"
# Whose errors tell of a bucket that cannot be reached, whatever their class.
_CLIENTS = {"aiohttp", "gcsfs", "google", "requests", "tensorflow"}
# A disk is full, a file too large, a quota used up.
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def path(name: str | os.PathLike[str]) -> Path:
  """A folder or file by its name; one in a bucket has pathlib's methods too.

  But for `resolve` and `absolute`, for which see below, and for `mkdir`, which
  would make a missing bucket: nothing here needs it.

  Raises:
    UserError: another store than Google's, or its package is missing.
  """
  text = os.fspath(name)
  if "://" not in text:
    return Path(text)
  if not text.startswith(_BUCKET):
    raise UserError(
      f"{text} is no folder, and of buckets only gs://... can be written into: "
      "mount this one, or give a folder"
    )
  if not text.removeprefix(_BUCKET).strip("/"):
    raise UserError(f"{text} names no bucket: give gs://BUCKET/NAME")
  if importlib.util.find_spec("gcsfs") is None:
    raise UserError(
      f"{text} needs the package gcsfs, which is not installed: "
      "pip install 'kdjax[gcs]'"
    )
  _set_up()
  return cast(Path, epath.Path(text))


def in_bucket(place: str | os.PathLike[str]) -> bool:
  return os.fspath(place).startswith(_BUCKET)


def absolute(place: str | os.PathLike[str]) -> Path:
  """The same place, wherever the process stands."""
  if in_bucket(place):
    return path(place)
  return Path(os.path.abspath(os.path.expanduser(place)))


def write(place: Path, content: bytes) -> None:
  """Whole or not at all, whatever kills the process.

  Raises:
    UserError: the bucket refuses it, or the disk is full.
  """
  if in_bucket(place):
    with reaching(place):
      place.write_bytes(content)
    return
  part = place.with_name(place.name + ".part")
  with room(place):
    place.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    part.replace(place)


@contextlib.contextmanager
def room(place: Path) -> Iterator[None]:
  """Tells in one line that there is no room to write a file.

  Raises:
    UserError: so; what else fails is left as it is.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in FULL:
      raise
    raise UserError(
      f"cannot write {place} ({os.strerror(error.errno)}): make room, and "
      "start the same command again"
    ) from error


def write_json(place: Path, value: Any) -> None:
  """`write`, of a value as indented JSON."""
  write(place, (json.dumps(value, indent=2) + "\n").encode())


def remove(folder: Path) -> None:
  """A folder with all that is in it, as far as it lets itself be removed."""
  with contextlib.suppress(OSError):
    epath.Path(folder).rmtree(missing_ok=True)


class Staged:
  """A folder whose files are appended to.

  Those of a bucket lie on this machine until `send` brings them there, each as
  one object.

  Attributes:
    here: the folder to write into: the very one, where it is no bucket's.
  """

  def __init__(self, folder: Path):
    self._folder, self._sent = folder, dict[Path, tuple[int, int]]()
    self.here = folder
    if in_bucket(folder):
      self.here = Path(tempfile.mkdtemp(prefix="kdjax-"))

  def send(self) -> None:
    """Brings what is new to the bucket; to be called after a flush.

    Raises:
      UserError: the bucket refuses it.
    """
    if self.here is self._folder:
      return
    for file in self.here.rglob("*"):
      state = file.stat()
      now = state.st_size, state.st_mtime_ns
      if file.is_file() and self._sent.get(file) != now:
        write(self._folder / file.relative_to(self.here), file.read_bytes())
        self._sent[file] = now

  def close(self) -> None:
    """The last `send`."""
    try:
      self.send()
    finally:
      if self.here is not self._folder:
        shutil.rmtree(self.here, ignore_errors=True)


def check(place: Path) -> None:
  """Refuses a place that cannot be written into, and changes nothing.

  Of a bucket it is asked whether it is there and may be looked at: Orbax asks
  for the bucket itself, which takes a right that objects do not:
  storage.buckets.get.

  Raises:
    UserError: so.
  """
  if in_bucket(place):
    storage = importlib.import_module("google.cloud.storage")
    with reaching(place):
      storage.Client().get_bucket(place.parts[2])  # of "/", "gs", its name
    return
  whole = absolute(place)
  # Where the folder, or what it is to be made in, already is.
  there = next(at for at in (whole, *whole.parents) if os.path.exists(at))
  if not there.is_dir():
    refused_as = errno.ENOTDIR
  elif os.access(there, os.W_OK | os.X_OK):
    return
  else:
    is_read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    refused_as = errno.EROFS if is_read_only else errno.EACCES
  raise cannot_write(place, refused_as)


def cannot_write(place: str | os.PathLike[str], number: int) -> UserError:
  """What is said of a folder that refuses; the number is the system's."""
  return UserError(
    f"cannot write into {place} ({os.strerror(number)}): use another folder"
  )


@contextlib.contextmanager
def reaching(place: Path) -> Iterator[None]:
  """Tells in one line why a bucket cannot be reached.

  Raises:
    UserError: so; what fails in a folder is left as it is.
  """
  try:
    yield
  except Exception as error:
    if not in_bucket(place) or not refused(error):
      raise
    raise UserError(
      f"cannot reach {place} ({in_line(str(error))[:300]}): check the bucket's "
      "name, and that this machine's service account may read, write and list "
      "it"
    ) from error


def refused(error: BaseException) -> bool:
  """Whether it is a store's refusal, and not a mistake in the program."""
  known = type(error).__module__.partition(".")[0] in _CLIENTS
  return known or isinstance(error, OSError)


def _set_up() -> None:
  # Whatever fails is raised too.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # It would remember what lay in a folder before others, TensorStore among
  # them, wrote into it.
  conf = importlib.import_module("fsspec.config").conf
  for name in ("gs", "gcs"):
    conf.setdefault(name, {})["use_listings_cache"] = False
