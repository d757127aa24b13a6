"""A run's folder of checkpoints: written in the background, read with care.

A checkpoint is the folder `<directory>/<step>`: in `state` Orbax holds the
arrays, in `meta` a JSON holds everything else, with a CRC-32 for each array and
one for itself. Orbax alone returns a flipped byte as a value and does not look
past a newest checkpoint that it cannot read.
"""

import base64
import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from kdjax.checkpoint import arrays
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
    self._keep = _Keep(keep_last, keep_best, {})
    self._metric, self._sign = metric, 1 if higher_is_better else -1
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
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    if metrics and self._metric is not None and self._metric not in metrics:
      raise unknown("metric", self._metric, metrics)
    manager = self._open()
    self.wait()
    if step in self._sound and step in self.steps:
      return
    self._make_way(manager, step)
    self._score(step, metrics)
    values, records = arrays.to_host(state)
    meta = {
      "step": step,
      "position": (
        {"base64": base64.b64encode(position).decode()}
        if isinstance(position, bytes)
        else {"json": position}
      ),
      "facts": dict(facts or {}),
      "metrics": metrics,
      "arrays": records,
    }
    with _quiet():
      manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(values),
          meta=ocp.args.JsonSave(_sealed(meta)),
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
    if self._manager is None:
      return
    try:
      with _quiet():
        self._manager.wait_until_finished()
    except BaseException:
      # Orbax has struck the old steps off its list before it wrote the new.
      self._manager.reload()
      raise

  def close(self) -> None:
    """Waits, then frees the threads."""
    try:
      self.wait()
    finally:
      manager, self._manager = self._manager, None
      if manager is not None:
        manager.close()

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._keep,
          cleanup_tmp_directories=True,
          save_root_metadata=False,
        ),
      )
      for step in self.steps if self._metric else []:
        # What is damaged cannot be a best one; `restore` reports it.
        with contextlib.suppress(Exception):
          self._score(step, _read_meta(self._directory / str(step))["metrics"])
    return self._manager

  def _score(self, step: int, metrics: Mapping[str, float]) -> None:
    self._keep.scores.pop(step, None)
    value = metrics.get(self._metric or "", math.nan)
    if math.isfinite(value):
      self._keep.scores[step] = self._sign * value

  def _make_way(self, manager: ocp.CheckpointManager, step: int) -> None:
    """Removes what `restore` found damaged, and a `step` of unknown origin."""
    at = math.inf if self._resumed is None else self._resumed
    old = [s for s in self.steps if s not in self._sound]
    damaged = [s for s in old if s > at]
    newest = max(set(self.steps) - set(damaged), default=step)
    if step < newest:
      raise UserError(
        f"cannot save step {step}: {self._directory} holds step {newest}, "
        "which this run has not reached; resume from it, or use an empty folder"
      )
    for s in damaged:
      manager.delete(s)
    if step in old and step not in damaged:
      manager.delete(step)


def steps(directory: str | os.PathLike[str]) -> list[int]:
  """The complete checkpoints of a folder, oldest first; [] if it is missing."""
  # Orbax's `checkpoint_steps` would count a copy called "best_5" as step 5.
  found = ocp.path.step.standard_name_format().find_all(_path(directory))
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
      one was made by another network or optimizer.
  """
  found = _newest(_path(directory), like, None, note)
  if found is None:
    return None
  meta, state = found
  position = meta["position"].get("json")
  if "base64" in meta["position"]:
    position = base64.b64decode(meta["position"]["base64"])
  return Restored(meta["step"], state, position, meta["facts"])


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


class _Keep(NamedTuple):
  """Orbax's preservation policy: the newest, and the highest scores.

  Not `best_fn`: with it Orbax deletes the newest checkpoint when enough older
  ones are better. Nor Orbax's own metrics: a manager with a policy forgets them
  when the process ends.
  """

  last: int
  best: int
  scores: dict[int, float]  # by step, higher is better, finite

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    scored = sorted((self.scores[s], s) for s in steps if s in self.scores)
    best = [step for _, step in scored[::-1][: self.best]]
    kept = {*steps[-self.last :], *best}
    return [checkpoint.step in kept for checkpoint in checkpoints]


def _newest(
  directory: epath.Path,
  like: PyTree,
  parts: tuple[str, ...] | None,
  note: Note,
) -> tuple[dict[str, Any], Any] | None:
  """(meta, tree), where `parts` are the fields of the state to be read."""
  wanted = arrays.named(like)
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
      problems = arrays.mismatches(records, wanted)
      values = {} if problems else arrays.read(path / "state", records)
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
    leaves = [arrays.place(values[n], x, records[n]) for n, x in wanted.items()]
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
  crc32 = meta.pop("crc32")
  if _sealed(meta)["crc32"] != crc32:
    raise ValueError("the checksum of meta differs")
  return meta


def _sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
  """`meta` as JSON gives it back, and a checksum of it."""
  text = json.dumps(json.loads(json.dumps(meta)), sort_keys=True)
  return {**json.loads(text), "crc32": zlib.crc32(text.encode())}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without Orbax's warning that the last save took longer than a second."""
  level = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  try:
    yield
  finally:
    absl.logging.set_verbosity(level)


def _path(directory: str | os.PathLike[str]) -> epath.Path:
  # `absolute` would take a bucket's address for a relative path.
  if "://" in os.fspath(directory):
    return epath.Path(directory)
  return epath.Path(os.path.abspath(os.path.expanduser(directory)))
