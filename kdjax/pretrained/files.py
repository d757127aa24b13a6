"""Safetensors on disk: one file, a folder with shards, or a name on the hub.

Nothing here unpickles: a pickle may run any code when it is read.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - makes bfloat16 a dtype that NumPy knows
import numpy as np

from kdjax.data.text.tokenizer import FILES as TOKENIZER_FILES
from kdjax.errors import UserError

WEIGHTS, INDEX, CONFIG = (
  "model.safetensors",
  "model.safetensors.index.json",
  "config.json",
)
GENERATION = "generation_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar")
_CONVERT = (
  "a pickle may run any code when it is read: convert it where you trust it "
  "with safetensors.torch.save_file(torch.load(f, weights_only=True), ...)"
)


_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


class Tensors(NamedTuple):
  """The tensors of a checkpoint, none of them read yet.

  Attributes:
    source: what the user named.
    shapes, dtypes: by name; dtypes as safetensors calls them ("BF16").
    load: reads one tensor.
    load_part: reads the part of one that slices name, and no more of the file.
    config: the `config.json` beside them; {} if there is none.
  """

  source: str
  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, str]
  load: Callable[[str], np.ndarray]
  load_part: Callable[[str, tuple[slice, ...]], np.ndarray]
  config: Mapping[str, Any]


def is_weights(source: str | Path) -> bool:
  """Whether a name is one for `read`, and not that of another folder.

  Weights are files, folders that hold weights, and what is not here and may be
  on the model hub; pickles among them, for `read` to refuse.
  """
  path = Path(source)
  if path.is_dir():
    return any(_names_weights(file) for file in path.iterdir())
  missing = not path.exists()
  on_hub = missing and _HUB_NAME.fullmatch(str(source)) is not None
  return path.is_file() or on_hub or _names_weights(path)


def _names_weights(path: Path) -> bool:
  return path.suffix in (".safetensors", *_PICKLES) or path.name == INDEX


def open_tensors(source: str | Path, revision: str | None = None) -> Tensors:
  """Opens a file, a folder, or what the hub has under a name.

  Raises:
    UserError: nothing there, a pickle, a truncated or corrupt file.
  """
  path = local(source, revision)
  files = _shards(path) if path.is_dir() else [path]
  held, shapes, dtypes = {}, {}, {}
  for file in files:
    opened = _open(file)
    for name in opened.keys():  # noqa: SIM118 - it is no mapping
      held[name] = opened
      tensor = opened.get_slice(name)
      shapes[name] = tuple(tensor.get_shape())
      dtypes[name] = tensor.get_dtype()
  folder = path if path.is_dir() else path.parent
  if path.is_dir():
    _check_index(folder, held)
  return Tensors(
    str(source),
    shapes,
    dtypes,
    lambda name: held[name].get_tensor(name),
    lambda name, part: held[name].get_slice(name)[part],
    _json(folder / CONFIG) if (folder / CONFIG).exists() else {},
  )


def local(source: str | Path, revision: str | None = None) -> Path:
  """The file or folder, downloaded first if it is a name on the hub."""
  path = Path(source)
  return path if path.exists() else _download(str(source), revision)


def _open(file: Path) -> Any:
  # Here, not above: the rest of kdjax does without it.
  from safetensors import SafetensorError, safe_open

  if not file.exists():
    raise UserError(f"{file} is missing: {INDEX} names it; fetch all shards")
  try:
    with file.open("rb") as opened:
      start = opened.read(2)
  except OSError as e:
    raise UserError(f"cannot read {file}: {e.strerror}") from e
  # Protocol 2 and later; a zip file holds those of newer versions of torch.
  if file.suffix in _PICKLES or start in (b"PK", b"\x80\x02", b"\x80\x04"):
    raise UserError(f"{file} is no safetensors file; {_CONVERT}")
  try:
    return safe_open(file, framework="numpy")
  except (SafetensorError, OSError) as e:
    raise UserError(
      f"{file} ({file.stat().st_size} bytes) is truncated or no safetensors "
      f"file: {e}; fetch it again"
    ) from e


def _shards(folder: Path) -> list[Path]:
  if (folder / WEIGHTS).exists():
    return [folder / WEIGHTS]
  if (folder / INDEX).exists():
    names = sorted(set(_weight_map(folder).values()))
    return [folder / name for name in names]
  there = sorted(file.name for file in folder.iterdir())
  pickles = any(Path(name).suffix in _PICKLES for name in there)
  raise UserError(
    f"{folder} has neither {WEIGHTS} nor {INDEX}, only "
    f"{', '.join(there) or 'nothing'}"
    + (f"; {_CONVERT}" if pickles else ": name the .safetensors file itself")
  )


def _check_index(folder: Path, held: Mapping[str, Any]) -> None:
  """Every tensor that the index names is in some shard."""
  if (folder / WEIGHTS).exists():
    return
  if missing := sorted(set(_weight_map(folder)) - set(held)):
    raise UserError(
      f"{folder / INDEX} names {', '.join(missing)}, which no shard has: fetch "
      "the shards again"
    )


def _weight_map(folder: Path) -> dict[str, str]:
  content = _json(folder / INDEX).get("weight_map")
  if not isinstance(content, dict) or not content:
    raise UserError(f"{folder / INDEX} has no weight_map: fetch it again")
  for file in content.values():
    if Path(file).name != file:
      raise UserError(
        f"{folder / INDEX} names {file!r}, needs files of its own folder"
      )
  return content


def _json(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"{path} is no JSON: {e}; fetch it again") from e
  if not isinstance(content, dict):
    raise UserError(f"{path} holds no JSON object: fetch it again")
  return content


def _download(name: str, revision: str | None) -> Path:
  """The local copy of what the model hub has under a name."""
  if _names_weights(Path(name)) or not _HUB_NAME.fullmatch(name):
    raise UserError(
      f"{name} does not exist: name a .safetensors file, a folder with "
      f"{WEIGHTS}, or a repository of the model hub (owner/name)"
    )
  try:
    from huggingface_hub import snapshot_download

    # Of language models the tokenizer, too, and how they are to generate.
    wanted = ["model*.safetensors", INDEX, CONFIG, GENERATION]
    wanted += TOKENIZER_FILES
    return Path(
      snapshot_download(name, revision=revision, allow_patterns=wanted)
    )
  except Exception as e:  # its client's, of several libraries
    reason = (str(e).strip() or repr(e)).splitlines()[0]
    raise UserError(
      f"{name} is no file or folder here, and snapshot_download({name!r}, "
      f"revision={revision!r}) found it neither on the model hub nor in its "
      f"cache ({reason}): mend the name, or bring the files and name their path"
    ) from e
