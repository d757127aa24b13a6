"""Real text that every machine holds: the sources of its own Python.

About 9 MB in 450 files, Python 3.11. Left out are tests, bundled programs,
installed packages, what the build wrote (it differs between machines), and two
packages of tables, whose near-copies would stand on both sides of a split.

The text differs between versions of Python. Its SHA-256 names the folder that
it is kept in and is part of every fingerprint; never compare numbers across.
"""

import functools
import hashlib
import os
import pathlib
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tokenizers import Tokenizer as Bpe
from tokenizers import models, pre_tokenizers, trainers

from kdjax.data import digits, named
from kdjax.data.text import tokenizer as tokenizing
from kdjax.data.text.documents import Documents
from kdjax.data.text.files import from_builder
from kdjax.data.text.tokenizer import SPECIALS, Tokenizer
from kdjax.data.text.tokens import write_folder
from kdjax.types import UserError

SPLITS = ("train", "validation", "test")

_LEFT_OUT = {
  *("test", "tests", "idlelib", "lib2to3", "turtledemo"),
  *("site-packages", "dist-packages", "encodings", "pydoc_data"),
}
_MIN_BYTES = 2_000_000

# TFDS refuses to register a name twice, which reloading this module would do.
with registered.skip_registration():

  class PythonSources(tfds.core.GeneratorBasedBuilder):
    """`text` and `path` of each source file, split by a hash of its path."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, sources: Mapping[str, bytes], **options: Any):
      self.sources = sources
      super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
      text = tfds.features.Text()
      return tfds.core.DatasetInfo(
        builder=self,
        description="The standard library's sources, as installed here.",
        homepage="https://docs.python.org/3/library",
        features=tfds.features.FeaturesDict({"text": text, "path": text}),
        metadata=tfds.core.MetadataDict(
          python=sys.version.split()[0], sha256=digest(self.sources)
        ),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager
      return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Any]]:
      paths = sorted(p for p in self.sources if split_of(p) == split)
      for n, path in enumerate(paths):
        yield n, {"text": self.sources[path], "path": path}


def documents(
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  root: str | os.PathLike[str] | None = None,
) -> Documents:
  """The source files of `train` (90 %), `validation` or `test` (5 % each).

  Args:
    split: which of them.
    data_dir: where they are kept as array_record, as `kdjax.data.load`.
    root: another folder of sources than the standard library's.

  Raises:
    UserError: another split, too little text, a folder that cannot be written.
  """
  if split not in SPLITS:
    raise UserError(
      f"got split={split!r}, needs one of {', '.join(SPLITS)}: choose one"
    )
  return from_builder(builder(data_dir, root), split)


def builder(
  data_dir: str | os.PathLike[str] | None = None,
  root: str | os.PathLike[str] | None = None,
) -> PythonSources:
  """The prepared builder, written to `data_dir` first if it is not there."""
  found = sources(root)
  folder = pathlib.Path(data_dir or digits.default_folder()).expanduser()
  # A configuration's name becomes a folder: no two texts share one.
  major, minor, *_ = sys.version_info
  config = tfds.core.BuilderConfig(
    name=f"python_{major}_{minor}_{digest(found)[:12]}",
    version=PythonSources.VERSION,
  )

  def made(at: pathlib.Path) -> PythonSources:
    with named._quiet():
      return PythonSources(
        found, data_dir=at, file_format="array_record", config=config
      )

  def prepare(at: pathlib.Path) -> None:
    prepared = made(at / "scratch")
    with named._quiet():
      prepared.download_and_prepare()
    for file in list(pathlib.Path(prepared.data_path).iterdir()):
      file.rename(at / file.name)
    shutil.rmtree(at / "scratch")

  target = pathlib.Path(made(folder).data_path)
  if not (target / "dataset_info.json").is_file():
    write_folder(target, prepare)
  return made(folder)


def bpe(
  *,
  vocab_size: int,
  data_dir: str | os.PathLike[str] | None = None,
  root: str | os.PathLike[str] | None = None,
) -> Tokenizer:
  """A byte-level BPE of the train split; the same for the same text.

  Trained at the first call (seconds) and kept in `data_dir`.

  Args:
    vocab_size: ids in all: 4 special tokens, 256 bytes, the rest merges.
    data_dir: as `documents`.
    root: as `documents`.

  Raises:
    UserError: a vocabulary that does not hold the bytes; as `documents`.
  """
  least = len(SPECIALS) + 256
  if vocab_size < least:
    raise UserError(
      f"got vocab_size={vocab_size}, needs {least} or more for the bytes and "
      "special tokens: raise it"
    )
  made = builder(data_dir, root)
  name = f"bpe_{vocab_size}"
  folder = pathlib.Path(made.data_path).parent / name
  if not (folder / "tokenizer.json").is_file():
    texts = from_builder(made, "train").examples
    trained = train_bpe((str(texts[n]) for n in range(len(texts))), vocab_size)
    ready = tokenizing.wrap(name, trained)
    write_folder(folder, functools.partial(tokenizing.save, ready))
  return tokenizing.from_folder(folder)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Bpe:
  """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909)."""
  bare = Bpe(models.BPE())
  bare.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore
    add_prefix_space=False
  )
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIALS),
    # The alphabet comes as a set; sorted, it gives the same ids each time.
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bare.train_from_iterator(texts, trainer)
  return tokenizing.build(bare.model)


def split_of(path: str) -> str:
  """By the path alone: a file stays in its split as others come and go."""
  place = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8]) % 20
  return {0: "test", 1: "validation"}.get(place, "train")


def digest(found: Mapping[str, bytes]) -> str:
  """SHA-256 of paths and contents."""
  made = hashlib.sha256()
  for path in sorted(found):
    made.update(f"{path}\0{len(found[path])}\0".encode() + found[path])
  return made.hexdigest()


def sources(
  root: str | os.PathLike[str] | None = None,
) -> dict[str, bytes]:
  """Path below `root` -> contents, of files that are UTF-8 and not empty.

  Raises:
    UserError: less than 2 MB of the standard library, as some slim builds of
      Python have.
  """
  top = pathlib.Path(root or sysconfig.get_path("stdlib"))
  found = {}
  for folder, below, files in os.walk(top):
    below[:] = sorted(set(below) - _LEFT_OUT)
    for name in sorted(files):
      if not name.endswith(".py") or name.startswith("_sysconfigdata"):
        continue
      path = pathlib.Path(folder, name)
      contents = path.read_bytes()
      if contents and _is_utf8(contents):
        found[path.relative_to(top).as_posix()] = contents
  size = sum(map(len, found.values()))
  if root is None and size < _MIN_BYTES:
    raise UserError(
      f"{top} holds {size} bytes of Python sources, needs {_MIN_BYTES}: use a "
      "Python whose standard library is there as .py files, or give other text"
    )
  return found


def _is_utf8(contents: bytes) -> bool:
  try:
    contents.decode()
  except UnicodeDecodeError:
    return False
  return True
