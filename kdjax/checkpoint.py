"""Saves and resumes a run: train state, input position and facts, on Orbax.

A checkpoint is the folder `<directory>/<step>`: `state` holds the arrays, each
under its path ("params/dense/kernel"), `meta` a JSON of everything else with a
CRC-32 for each array and one for itself. Orbax alone would return a flipped
byte as a value and would not look past an unreadable newest checkpoint. The
teacher is never stored; `fingerprint` of its variables belongs in the facts.

Of Orbax's own log only warnings and errors reach the terminal.
"""

import base64
import concurrent.futures
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from kdjax.errors import UserError, unknown
from kdjax.types import Params, Stats, TrainState

Position = dict[str, Any] | bytes | None
Note = Callable[[str], None]


class Restored(NamedTuple):
  """What `restore` returns.

  Attributes:
    step: number of updates made when the checkpoint was taken.
    state: bit-identical to what was saved, on the shardings of `like`.
    position: where the input stood.
    facts: what the run said of itself.
  """

  step: int
  state: TrainState
  position: Position
  facts: dict[str, Any]


class Checkpointer:
  """Writes the checkpoints of one run in the background.

  Only one process may write into a folder at a time: opening an existing one
  removes what a killed run left half-written. To read the folder of a run that
  may be alive, use `restore` and `load_params`, which change nothing.

  Args:
    directory: where the numbered folders go; made by the first `save`.
    keep_last: how many of the newest to keep, at least 1.
    keep_best: how many of the best by `metric` to keep beside them.
    metric: a name in what `save` gets as metrics, such as "eval/nll". A
      checkpoint without it, or where it is not finite, is never a best one.
    higher_is_better: whether the best is the largest.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep_last: int = 2,
    keep_best: int = 1,
    metric: str | None = None,
    higher_is_better: bool = False,
  ):
    if keep_last < 1 or keep_best < 0:
      raise UserError(
        f"got keep_last={keep_last}, keep_best={keep_best}: needs at least 1 "
        "and 0; a run without a newest checkpoint cannot be resumed"
      )
    self._directory = _path(directory)
    self._keep_last, self._keep_best = keep_last, keep_best
    self._metric, self._sign = metric, 1 if higher_is_better else -1
    self._scores: dict[int, float] = {}
    self._sound: set[int] = set()  # steps written or verified by this object
    self._resumed: int | None = None
    self._manager: ocp.CheckpointManager | None = None
    if self._directory.exists():
      self._open()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  @property
  def steps(self) -> list[int]:
    """The complete checkpoints, oldest first."""
    return steps(self._directory)

  def save(
    self,
    step: int,
    state: TrainState,
    *,
    position: Position = None,
    facts: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
  ) -> None:
    """Copies the state to the host, starts writing it, and returns.

    The caller may donate the state at once. A save that is still being written
    is waited for; its failure is raised here or in `wait`. A step that this
    object has already saved or restored is skipped; one of unknown origin is
    written anew.

    Args:
      step: number of updates made.
      state: every array, fully addressable from this process.
      position: of the input, as JSON (keys become strings, tuples lists) or
        bytes.
      facts: JSON; whatever a later run must compare, such as the teacher's
        fingerprint.
      metrics: name -> number, or None when nothing was evaluated.

    Raises:
      UserError: the folder holds a newer step that was not resumed from, or
        `metrics` lacks the metric to keep the best by.
    """
    manager = self._open()
    self.wait()
    if step in self._sound and step in self.steps:
      return
    self._make_way(manager, step)
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    if metrics and self._metric is not None and self._metric not in metrics:
      raise unknown("metric", self._metric, metrics)
    self._score(step, metrics)
    arrays, records = _to_host(state)
    meta = {
      "step": step,
      "position": _pack(position),
      "facts": dict(facts or {}),
      "metrics": metrics,
      "arrays": records,
    }
    manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(_sealed(meta))
      ),
      force=True,
    )
    self._sound.add(step)

  def restore(self, like: TrainState, note: Note = print) -> Restored | None:
    """`restore` of this folder; training then goes on from what it returns.

    Newer checkpoints, which it found damaged, are removed by the next `save`.
    """
    self.wait()
    restored = restore(self._directory, like, note)
    if restored is not None:
      self._resumed = restored.step
      self._sound = {restored.step}
    return restored

  def wait(self) -> None:
    """Returns when the last save is on disk; raises what made it fail."""
    if self._manager is not None:
      try:
        self._manager.wait_until_finished()
      except BaseException:
        # Orbax has struck the old steps off its list before it wrote the new.
        self._manager.reload()
        raise

  def close(self) -> None:
    """Waits, then frees the threads."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          # Not `best_fn`: with it Orbax deletes the newest checkpoint when
          # enough older ones are better. Nor Orbax's own metrics, which a
          # manager with a policy keeps in memory only.
          preservation_policy=_Keep(self._kept),
          cleanup_tmp_directories=True,
          save_root_metadata=False,
        ),
      )
      for step in self.steps:
        try:
          self._score(step, _read_meta(self._directory / str(step))["metrics"])
        except Exception:  # `restore` reports it; here it is just no best one
          continue
    return self._manager

  def _score(self, step: int, metrics: Mapping[str, float]) -> None:
    self._scores.pop(step, None)
    value = metrics.get(self._metric, math.nan) if self._metric else math.nan
    if math.isfinite(value):
      self._scores[step] = self._sign * value

  def _kept(self, all_steps: Sequence[int]) -> set[int]:
    scored = [step for step in all_steps if step in self._scores]
    scored.sort(key=lambda step: (self._scores[step], step), reverse=True)
    newest = sorted(all_steps)[-self._keep_last :]
    return {*newest, *scored[: self._keep_best]}

  def _make_way(self, manager: ocp.CheckpointManager, step: int) -> None:
    """Removes damaged steps after the resumed one, and an unsound `step`."""
    for old in self.steps:
      damaged = self._resumed is not None and old > self._resumed
      if old not in self._sound and (damaged or old == step):
        manager.delete(old)
    newest = max(self.steps, default=-1)
    if step < newest and step not in self._sound:
      raise UserError(
        f"cannot save step {step}: {self._directory} holds step {newest}, "
        "which this run did not start from; resume from it, or use an empty "
        "folder"
      )


def steps(directory: str | os.PathLike[str]) -> list[int]:
  """The complete checkpoints of a folder, oldest first; [] if it is missing."""
  return sorted(ocp.utils.checkpoint_steps(_path(directory)))


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
      one was made by another network or optimizer.
  """
  found = _newest(_path(directory), like, None, note)
  if found is None:
    return None
  meta, state = found
  return Restored(meta["step"], state, _unpack(meta["position"]), meta["facts"])


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
  found = _newest(_path(directory), tree, tuple(tree), note)
  if found is None:
    raise UserError(
      f"no checkpoint in {directory}: give the folder that holds a run's "
      "numbered checkpoints, or train the network first"
    )
  return found[1]["params"], found[1]["stats"]


def fingerprint(tree: PyTree) -> str:
  """128-bit BLAKE2b, in hex, of a tree's names, dtypes, shapes and bytes.

  It depends neither on the order of insertion nor on the sharding.
  """
  digest = hashlib.blake2b(digest_size=16)
  for name, leaf in sorted(_named(tree).items()):
    array = np.asarray(_data(leaf))
    digest.update(f"{name} {_dtype(leaf)} {array.shape}\n".encode())
    digest.update(_bytes(array))
  return digest.hexdigest()


class _Keep(NamedTuple):
  """An Orbax preservation policy from a function of the steps."""

  kept: Callable[[Sequence[int]], set[int]]

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context
    kept = self.kept([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in kept for checkpoint in checkpoints]


def _path(directory: str | os.PathLike[str]) -> epath.Path:
  # `absolute` would take a bucket's address for a relative path.
  if "://" in os.fspath(directory):
    return epath.Path(directory)
  return epath.Path(os.path.abspath(os.path.expanduser(directory)))


def _newest(
  directory: epath.Path,
  like: PyTree,
  parts: tuple[str, ...] | None,
  note: Note,
) -> tuple[dict[str, Any], Any] | None:
  """(meta, tree), where `parts` are the fields of the state to be read."""
  wanted = _named(like)
  damaged = []
  for step in reversed(steps(directory)):
    path = directory / str(step)
    try:
      meta = _read_meta(path)
      records = {
        name: record
        for name, record in meta["arrays"].items()
        if parts is None or name.split("/", 1)[0] in parts
      }
      problems = _mismatches(records, wanted)
      values = {} if problems else _read_arrays(path, records)
    except MemoryError:
      raise
    except Exception as error:  # whatever a reader makes of damaged bytes
      why = (str(error) or type(error).__name__).splitlines()[0]
      damaged.append(f"step {step} is damaged ({why[:120]})")
      continue
    if problems:
      raise UserError(
        f"checkpoint {path} does not fit: {'; '.join(problems)}: build the "
        "network and optimizer that it was made with, or use an empty folder"
      )
    if damaged:
      note(f"{directory}: {'; '.join(damaged)}: using step {step}")
    leaves = [_place(values[k], wanted[k], records[k]) for k in wanted]
    return meta, jax.tree.unflatten(jax.tree.structure(like), leaves)
  if damaged:
    raise UserError(
      f"no readable checkpoint in {directory}: {'; '.join(damaged)}: put back "
      "a copy, or start again in an empty folder"
    )
  return None


def _read_meta(path: epath.Path) -> dict[str, Any]:
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    meta = reader.restore(path / "meta")
  if _sealed({k: v for k, v in meta.items() if k != "crc32"}) != meta:
    raise ValueError("the checksum of meta differs")
  return meta


def _read_arrays(
  path: epath.Path, records: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  empty = {
    name: np.zeros(record["shape"], jnp.dtype(record["stored"]))
    for name, record in records.items()
    if 0 in record["shape"]
  }
  stored = {name: 0 for name in records if name not in empty}
  to_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    values = reader.restore(
      path / "state",
      args=ocp.args.PyTreeRestore(
        stored,
        restore_args=jax.tree.map(lambda _: to_numpy, stored),
        partial_restore=True,
      ),
    )
  bad = [
    name
    for name, crc32 in zip(values, _checksums(values.values()))
    if crc32 != records[name]["crc32"]
  ]
  if bad:
    raise ValueError(f"checksum differs: {', '.join(bad)}")
  return {**values, **empty}


def _mismatches(
  records: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[str]:
  def told(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"

  got = {n: told(r["dtype"], r["shape"]) for n, r in records.items()}
  needed = {n: told(_dtype(x), _data_shape(x)) for n, x in wanted.items()}
  return [
    *(f"missing {n} {needed[n]}" for n in needed if n not in got),
    *(f"surplus {n} {got[n]}" for n in got if n not in needed),
    *(
      f"{n} is {got[n]}, needs to be {needed[n]}"
      for n in needed
      if n in got and got[n] != needed[n]
    ),
  ]


def _to_host(
  state: PyTree,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
  """Copies of the arrays by name, and what `meta` records of each."""
  leaves = _named(state)
  data = {name: _data(leaf) for name, leaf in leaves.items()}
  for leaf in data.values():
    if isinstance(leaf, jax.Array):
      leaf.copy_to_host_async()
  # On CPU `asarray` would be a view into buffers about to be donated.
  arrays = {name: np.array(leaf) for name, leaf in data.items()}
  # An array sharded over processes will need one checksum for each shard, under
  # the shard's index; here every array is whole.
  records = {
    name: {
      "dtype": _dtype(leaves[name]),
      "shape": list(array.shape),
      "stored": str(array.dtype),
      "crc32": crc32,
    }
    for (name, array), crc32 in zip(arrays.items(), _checksums(arrays.values()))
  }
  for name, leaf in leaves.items():
    if _is_key(leaf):
      records[name]["impl"] = str(jax.random.key_impl(leaf))
  # Orbax refuses an array without elements; its record says all there is.
  return {name: a for name, a in arrays.items() if a.size}, records


def _place(value: np.ndarray, like: Any, record: Mapping[str, Any]) -> Any:
  """The value as `like` is: a key or numbers, where it lay."""
  if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
    return value
  array = jnp.asarray(value)
  if _is_key(like):
    array = jax.random.wrap_key_data(array, impl=record["impl"])
  # An uncommitted array stays so: committed to one device it could not meet
  # those that span several.
  if like.sharding is None or not getattr(like, "committed", True):
    return array
  return jax.device_put(array, like.sharding)


def _named(tree: PyTree) -> dict[str, Any]:
  """Leaves by path, in the tree's order."""
  flat = jax.tree_util.tree_leaves_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in flat
  }
  if len(named) < len(flat):
    raise UserError(
      f"{len(flat)} arrays share {len(named)} names: no two paths may read "
      'alike, as ["a/b"] and ["a"]["b"] do; rename one'
    )
  return named


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def _data(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _data_shape(leaf: Any) -> tuple[int, ...]:
  if _is_key(leaf):
    return jax.eval_shape(jax.random.key_data, leaf).shape
  return np.shape(leaf)


def _dtype(leaf: Any) -> str:
  return str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def _bytes(array: np.ndarray) -> memoryview:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _checksums(arrays: Any) -> Iterator[int]:
  """CRC-32 of each array's dtype, shape and bytes."""

  def checksum(array: np.ndarray) -> int:
    head = f"{array.dtype} {array.shape}".encode()
    return zlib.crc32(_bytes(array), zlib.crc32(head))

  with concurrent.futures.ThreadPoolExecutor() as pool:  # it frees the GIL
    return pool.map(checksum, arrays)


def _sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
  """`meta` as JSON gives it back, and a checksum of it."""
  text = json.dumps(json.loads(json.dumps(meta)), sort_keys=True)
  return {**json.loads(text), "crc32": zlib.crc32(text.encode())}


def _pack(position: Position) -> Any:
  if isinstance(position, bytes):
    return {"base64": base64.b64encode(position).decode()}
  return {"json": position}


def _unpack(packed: Mapping[str, Any]) -> Position:
  if "base64" in packed:
    return base64.b64decode(packed["base64"])
  return packed["json"]
