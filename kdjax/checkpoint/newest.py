"""Reads a run's folder with care: the newest checkpoint that is sound.

All processes read it together, each its own part, and all of them go on from
the same step: what one could not read, none of them uses.
"""

import base64
import json
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from kdjax import files, processes
from kdjax.checkpoint import arrays
from kdjax.errors import UserError
from kdjax.types import Params, Stats, TrainState

Position = dict[str, Any] | bytes | None
Note = Callable[[str], None]


class Restored(NamedTuple):
  """What `restore` returns.

  Attributes:
    step: number of batches taken, and of updates but for those skipped.
    state: bit-identical to what was saved, on the shardings of `like`.
    position: where the input stood.
    facts: what the run said of itself.
  """

  step: int
  state: TrainState
  position: Position
  facts: dict[str, Any]


def steps(directory: str | os.PathLike[str]) -> list[int]:
  """The complete checkpoints of a folder, oldest first; [] if it is missing."""
  # Orbax's `checkpoint_steps` would count a copy called "best_5" as step 5.
  found = ocp.path.step.standard_name_format().find_all(absolute(directory))
  return sorted(checkpoint.step for checkpoint in found)


def restore(
  directory: str | os.PathLike[str], like: TrainState, note: Note = print
) -> Restored | None:
  """The newest checkpoint whose every array has its checksum; changes nothing.

  Args:
    directory: what a `Checkpointer` wrote.
    like: a state of arrays or of `jax.ShapeDtypeStruct`, whose structure,
      shapes, dtypes and shardings the result has.
    note: gets one line when a damaged checkpoint had to be passed over.

  Returns:
    None when there is no checkpoint.

  Raises:
    UserError: there are checkpoints and all are damaged; or the newest sound
      one was made by another network or optimizer, or by another number of
      processes whose inputs stood at positions of their own.
  """
  found = _newest(absolute(directory), like, None, note)
  if found is None:
    return None
  meta, state = found
  return Restored(
    meta["step"], state, _unpacked(meta["position"]), meta["facts"]
  )


def load_params(
  directory: str | os.PathLike[str],
  like: tuple[Params, Stats],
  note: Note = print,
) -> tuple[Params, Stats]:
  """(params, stats) of the newest sound checkpoint: a teacher from its run.

  Nothing is converted, padded or dropped; the rest of the state is not read.

  Args:
    directory: what a `Checkpointer` wrote.
    like: (params, stats), as for `restore`.
    note: as for `restore`.

  Raises:
    UserError: as `restore`, or there is no checkpoint.
  """
  tree = {"params": like[0], "stats": like[1]}
  found = _newest(absolute(directory), tree, tuple(tree), note)
  if found is None:
    raise UserError(
      f"no checkpoint in {directory}: give the folder that holds a run's "
      "numbered checkpoints, or train the network first"
    )
  return found[1]["params"], found[1]["stats"]


class _Read(NamedTuple):
  meta: dict[str, Any]
  arrays: dict[str, Any]  # name -> as read
  records: dict[str, Any]
  problems: list[str]  # what does not fit; nothing was read then


def _newest(
  directory: epath.Path,
  like: PyTree,
  parts: tuple[str, ...] | None,
  note: Note,
) -> tuple[dict[str, Any], Any] | None:
  """(meta, tree), where `parts` are the fields of the state to be read."""
  wanted = arrays.named(like)
  unread = []
  for step in _agreed_steps(directory):
    path = directory / str(step)
    found, why = None, ""
    try:
      found = _read(path, wanted, parts)
    except MemoryError:
      raise
    except Exception as error:  # whatever a reader makes of damaged bytes
      why = (str(error) or type(error).__name__).splitlines()[0][:120]
    why = _first(why)
    if found is not None and not why:
      bad = arrays.damaged(found.arrays, found.records)
      why = _first(f"checksum differs: {', '.join(bad)}"[:120] if bad else "")
    if found is None or why:
      unread.append(f"step {step} is damaged ({why})")
      continue
    if found.problems:
      raise UserError(
        f"checkpoint {path} does not fit: {'; '.join(found.problems)}: build "
        "the network and optimizer that it was made with, or use an empty "
        "folder"
      )
    if unread:
      note(f"{directory}: {'; '.join(unread)}: using step {step}")
    leaves = [
      arrays.place(found.arrays[n], x, found.records[n])
      for n, x in wanted.items()
    ]
    return found.meta, jax.tree.unflatten(jax.tree.structure(like), leaves)
  if unread:
    raise UserError(
      f"no readable checkpoint in {directory}: {'; '.join(unread)}: put back "
      "a copy, or start again in an empty folder"
    )
  return None


def _agreed_steps(directory: epath.Path) -> list[int]:
  """Newest first: those that any process sees, so that none is passed over."""
  seen = processes.gather(steps(directory))
  return sorted({step for own in seen for step in own}, reverse=True)


def _first(why: str) -> str:
  """The first trouble that a process had, "" if there was none."""
  told = processes.gather(why)
  troubles = [
    f"process {n}: {text}" if len(told) > 1 else text
    for n, text in enumerate(told)
    if text
  ]
  return troubles[0] if troubles else ""


def _read(
  path: epath.Path, wanted: Mapping[str, Any], parts: tuple[str, ...] | None
) -> _Read:
  """This process's part; nothing here waits for another."""
  meta = read_meta(path)
  records = {
    name: record
    for name, record in meta["arrays"].items()
    if parts is None or name.split("/", 1)[0] in parts
  }
  problems = arrays.mismatches(records, wanted)
  values = {} if problems else arrays.read(path / "state", records, wanted)
  return _Read(meta, values, records, problems)


def read_meta(path: epath.Path) -> dict[str, Any]:
  """What was saved beside the arrays; raises if it is damaged."""
  meta = dict(ocp.JsonCheckpointHandler().restore(path / "meta"))
  crc32 = meta.pop("crc32")
  if sealed(meta)["crc32"] != crc32:
    raise ValueError("the checksum of meta differs")
  return meta


def packed(position: Position) -> dict[str, Any]:
  """A position as JSON: that of all processes, or each one's own.

  All processes must call it together.
  """
  own = {"json": position}
  if isinstance(position, bytes):
    own = {"base64": base64.b64encode(position).decode()}
  each = processes.gather(own)
  return own if all(other == each[0] for other in each) else {"each": each}


def _unpacked(packed: Mapping[str, Any]) -> Position:
  """This process's position."""
  if "each" in packed:
    each, count = packed["each"], jax.process_count()
    if len(each) != count:
      raise UserError(
        f"the inputs of {len(each)} processes stood at positions of their own, "
        f"which {count} cannot go on from: start {len(each)}, or give batches "
        "whose position is one number for all, as those of kdjax.data"
      )
    packed = each[jax.process_index()]
  if "base64" in packed:
    return base64.b64decode(packed["base64"])
  return packed.get("json")


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
  """`meta` as JSON gives it back, and a checksum of it."""
  text = json.dumps(json.loads(json.dumps(meta)), sort_keys=True)
  return {**json.loads(text), "crc32": zlib.crc32(text.encode())}


def absolute(directory: str | os.PathLike[str]) -> epath.Path:
  return epath.Path(files.absolute(directory))
