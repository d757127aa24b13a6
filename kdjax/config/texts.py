"""A config's texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdjax import errors
from kdjax.data import text
from kdjax.data.digits import default_folder
from kdjax.data.text import corpus

PYTHON_SOURCES = "python_sources"


def documents(config: Mapping[str, Any]) -> tuple[text.Documents, ...]:
  """The training and the held-out documents that `config.data` names.

  By `name`: `python_sources`, or a prepared TFDS dataset, and two splits. With
  no name, files: `path`, and `eval_path` or a share of `path`.
  """
  name, path = config["name"], config["path"]
  if bool(name) == bool(path):
    raise errors.UserError(
      f"got data.name={name!r}, data.path={path!r}: name one of the two, files "
      f"by path, or {PYTHON_SOURCES!r} or a TFDS dataset by name"
    )
  splits = config["train_split"], config["eval_split"]
  if name == PYTHON_SOURCES:
    at = config["data_dir"] or None
    return tuple(corpus.documents(split, data_dir=at) for split in splits)
  if name:
    kept = dict(field=config["field"], data_dir=config["data_dir"] or None)
    return tuple(text.from_tfds(name, split, **kept) for split in splits)
  found = text.read(path.split(","), field=config["field"])
  if config["eval_path"]:
    held_out = text.read(config["eval_path"].split(","), field=config["field"])
    return found, held_out
  return text.hold_out(found, config["eval_share"])


def token_folder(config: Mapping[str, Any]) -> Path:
  """Where tokens are kept: beside the data sets."""
  return Path(config["data_dir"] or default_folder()).expanduser()
