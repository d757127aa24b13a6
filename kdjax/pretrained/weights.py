"""`read` and `write`: a network's variables from and to safetensors."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import errors, models
from kdjax.errors import UserError
from kdjax.pretrained import hub, names, stacked
from kdjax.pretrained.files import CONFIG, WEIGHTS, Tensors, open_tensors
from kdjax.pretrained.names import Place
from kdjax.pretrained.tables import TABLES
from kdjax.types import Variables

_DTYPES = ("F32", "F16", "BF16")
_HEADS = ("classifier/", "distillation_classifier/")
_NO_ARGUMENTS: Mapping[str, Any] = {}


def layouts(family: str) -> tuple[str, ...]:
  """The layouts that networks of a family can be read from.

  Args:
    family: a name in `models.MODELS`, or "" for a network of one's own.
  """
  if family and family not in models.MODELS:
    raise errors.unknown("family", family, models.MODELS)
  return (*TABLES.get(family, {}), "kdjax")


def read(
  source: str | Path,
  like: Variables,
  *,
  family: str,
  layout: str | None = None,
  arguments: Mapping[str, Any] = _NO_ARGUMENTS,
  drop_head: bool = False,
  revision: str | None = None,
) -> Variables:
  """`(params, stats)` with the values of a checkpoint.

  Tensors are read one at a time, each turned to our axes and to the dtype of
  its array in `like`.

  Args:
    source: a .safetensors file; a folder with model.safetensors, or with the
      index of its shards; or a name on the model hub, downloaded once.
    like: the network's variables, or their shapes (`jax.eval_shape` of `init`).
    family: the network's name in `models.MODELS`; "" for another, which has
      the layout "kdjax" alone.
    layout: one of `layouts(family)`; None = the one whose names the file has.
    arguments: what the network was built with, for all that shapes do not tell
      (heads, epsilon, padding): compared with what the file tells of it. What
      is not here has the constructor's value.
    drop_head: leaves the file's classifiers out and keeps those of `like`, as
      they are, for another number of classes.
    revision: of the hub's repository.

  Raises:
    UserError: no such checkpoint; a pickle; a truncated file; or, all in one,
      names that are missing, surplus or of another shape or dtype, another
      number of classes, and what the network would compute otherwise.
  """
  tensors = open_tensors(source, revision)
  flat, tree = jax.tree_util.tree_flatten_with_path(tuple(like))
  whole = {_path(path): value for path, value in flat}
  arrays = stacked.apart(family, whole)
  if layout is None:
    layout = _nearest(family, arrays, tensors)
  places = _places(family, layout, arrays)
  heads = {p for p in places if p.startswith(_HEADS)} if drop_head else set()
  if any(isinstance(arrays[p], jax.ShapeDtypeStruct) for p in heads):
    raise UserError(
      "drop_head keeps the classifier of `like`, which has its shape alone: "
      "give the variables of init"
    )
  needed = {path: at for path, at in places.items() if path not in heads}
  dropped = {places[path].name for path in heads}
  shapes = {path: tuple(value.shape) for path, value in arrays.items()}
  problems = _misfits(tensors, needed, dropped, shapes)
  problems += hub.differences(family, layout, shapes, arguments, tensors.config)
  if problems:
    raise UserError(
      f"{source} (layout {layout}) does not fit the network: "
      + "; ".join(problems)
    )

  def value(path: str) -> Any:
    if path in heads:
      return arrays[path]
    place = places[path]
    array = names.from_stored(place, tensors.load(place.name))
    return array.astype(arrays[path].dtype)

  # `asarray` would compile a program for each shape.
  return tree.unflatten(
    jax.device_put(stacked.together(family, path, like, value))
    for path, like in whole.items()
  )


def write(
  folder: str | Path,
  variables: Variables,
  *,
  family: str,
  layout: str,
  arguments: Mapping[str, Any] = _NO_ARGUMENTS,
  extra_config: Mapping[str, Any] = _NO_ARGUMENTS,
) -> Path:
  """Writes model.safetensors, and for the hub's layout its config.json.

  The other library loads it: torchvision and timm by `load_state_dict`, the
  hub's by `AutoModelForImageClassification.from_pretrained(folder)`. Arrays
  keep their dtype. Files appear whole or not at all.

  Args:
    folder: made where it does not exist.
    variables: `(params, stats)` of the network.
    family, arguments: as for `read`; `arguments` decide the config.json.
    layout: "torchvision", "timm", "hub" or "kdjax".
    extra_config: further keys of config.json, such as `id2label`.

  Returns:
    The path of model.safetensors.

  Raises:
    UserError: a layout that the family does not have.
  """
  from safetensors.numpy import save_file

  flat, _ = jax.tree_util.tree_flatten_with_path(tuple(variables))
  arrays = stacked.apart(family, {_path(path): x for path, x in flat})
  places = _places(family, layout, arrays)
  tensors = names.to_stored(places, arrays)
  if layout != "kdjax":
    tensors |= _counts(tensors)
  # Versions of transformers refuse a file that does not say whose it is.
  metadata = {"format": "kdjax" if layout == "kdjax" else "pt"}
  folder = Path(folder)
  if layout == "hub":
    shapes = {path: tuple(value.shape) for path, value in arrays.items()}
    config = hub.config(family, shapes, arguments, extra_config)
    text = json.dumps(config, indent=2) + "\n"
    # Before the weights, which are then never without it.
    _whole(folder / CONFIG, lambda path: path.write_text(text))
  return _whole(
    folder / WEIGHTS, lambda path: save_file(tensors, path, metadata)
  )


def _counts(tensors: Collection[str]) -> dict[str, np.ndarray]:
  """The number of batches that torch keeps with batch statistics, unused."""
  norms = [
    name.removesuffix("running_mean")
    for name in tensors
    if name.endswith(".running_mean")
  ]
  return {
    f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms
  }


def _whole(path: Path, write: Callable[[Path], Any]) -> Path:
  """Writes a file under another name, then gives it its own."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    write(temporary)
    # safetensors lets the owner alone read; a file that is served has others.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
  return path


def _path(keys: tuple[Any, ...]) -> str:
  return "/".join(str(k.key) for k in keys[1:])  # keys[0]: params or stats


def _places(
  family: str, layout: str, paths: Collection[str]
) -> dict[str, Place]:
  if layout not in layouts(family):
    raise errors.unknown(f"layout of {family}", layout, layouts(family))
  if layout == "kdjax":
    return names.own_names(paths)
  places = names.places(TABLES[family][layout], paths)
  if left := [path for path in paths if path not in places]:
    raise UserError(
      f"the layout {layout} of {family} has no name for {', '.join(left)}: "
      'take layout="kdjax"'
    )
  return places


def _nearest(family: str, paths: Collection[str], tensors: Tensors) -> str:
  """The layout that has most of the file's names; the first of equals."""
  found = {}
  for layout in layouts(family):
    table = TABLES.get(family, {}).get(layout)
    places = names.places(table, paths) if table else names.own_names(paths)
    wanted = {place.name for place in places.values()}
    found[layout] = len(wanted & set(tensors.shapes))
  best = max(found, key=lambda layout: found[layout])
  if not found[best]:
    raise UserError(
      f"{tensors.source} has no name of a {family or 'network'}, in none of "
      f"the layouts {', '.join(found)}; it has {_some(tensors.shapes)}"
    )
  return best


def _misfits(
  tensors: Tensors,
  needed: Mapping[str, Place],
  dropped: Collection[str],
  shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
  """All that is missing, surplus or of another shape or dtype, in words."""
  wanted = {place.name for place in needed.values()}
  missing = sorted(wanted - set(tensors.shapes))
  surplus = sorted(
    name
    for name in set(tensors.shapes) - wanted - set(dropped)
    if not name.endswith("num_batches_tracked")
  )
  misshaped, mistyped, classes = set(), set(), set()
  for path, place in needed.items():
    if (got := tensors.shapes.get(place.name)) is None:
      continue
    want = names.stored_shape(place, shapes[path])
    if tensors.dtypes[place.name] not in _DTYPES:
      mistyped.add(f"{place.name} {tensors.dtypes[place.name]}")
    axis = 0 if place.axes else -1  # of the classes, in a classifier
    if got == want:
      continue
    if path.startswith(_HEADS) and _but(axis, got) == _but(axis, want):
      classes.add((got[axis], want[axis]))
    else:
      misshaped.add(f"{place.name} {list(got)} for {list(want)}")
  told = {
    "missing": missing,
    "surplus": surplus,
    "misshaped": sorted(misshaped),
    f"neither {' nor '.join(_DTYPES)}": sorted(mistyped),
  }
  problems = [
    f"{len(found)} {what}: {', '.join(found)}"
    for what, found in told.items()
    if found
  ]
  return problems + [
    f"it has {theirs} classes, the network {ours}: set "
    f"--config.student.num_classes={theirs} "
    f"(--config.teacher.num_classes={theirs} for a teacher), or drop the head "
    "with drop_head=True (--config.student.drop_head=True)"
    for theirs, ours in sorted(classes)
  ]


def _but(axis: int, shape: Sequence[int]) -> list[int]:
  rest = list(shape)
  del rest[axis]
  return rest


def _some(found: Collection[str]) -> str:
  first = sorted(found)[:3]
  return f"{', '.join(first)} ..." if len(found) > 3 else ", ".join(first)
