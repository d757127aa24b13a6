"""Trains (or loads) a teacher, trains a student alone, distils it, compares.

    python -m kdjax.train --config=configs/digits.py --workdir=runs/digits

  --config=FILE[:ARG]   a config file; `configs/digits.py:smoke` takes seconds
  --config.NAME=VALUE   another value for one of its keys, such as
                        --config.alpha=0.5 or --config.phases.alone.steps=900
  --workdir=FOLDER      for checkpoints, metrics and results.json; in a bucket
                        too, as gs://BUCKET/NAME (needs kdjax[gcs])
  --wandb=PROJECT       send the metrics to Weights & Biases too
  --logger=MODULE:NAME  or to a logger of your own: see kdjax.loggers
  --help                this text

On a TPU pod, on GKE, under Slurm and Open MPI the same line, started once for
each machine (or GPU), makes one run. Elsewhere each process is told its place;
see also `python -m kdjax.launch --help` and the folder launch/.

  --coordinator=HOST:PORT  where process 0 waits for the others
  --processes=N            how many there are
  --process=I              which of them this is, from 0
  --start_seconds=S        how long to wait for the others (300)
  --lost_seconds=S         after so long without a sign of life a process counts
                           as lost, and all end (60)

Killed and started again, the same line goes on where it was; on SIGTERM it
saves first. Exit codes: 0 done, 1 an error in the program, 2 a mistake that the
message explains, 75 another process of the run was lost or did not come, 76 no
step for --config.hang_minutes, 130 Ctrl-C, 143 SIGTERM; 134 lost too, where jax
itself noticed. After 75 and above, start again.
"""

import functools
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

import kdjax.config as configuration
from kdjax import (
  commands,
  errors,
  files,
  loggers,
  preemption,
  processes,
  progress,
  results,
)
from kdjax.experiment import experiment, run
from kdjax.loggers import Logger

_CODES = {
  processes.AbsentError: 75,
  errors.UserError: 2,
  preemption.Preempted: 128 + signal.SIGTERM,
}

# Keys that change nothing of what a run has made so far: more seeds have
# folders of their own, and a state may lie on other devices than it did.
_FREE = {
  "seeds",
  "profile",
  "hang_minutes",
  "show_sharding",
  "mesh.data",
  "mesh.fsdp",
  "mesh.model",
  "teacher.partition",
  "student.partition",
}


def train(
  config: Any, workdir: str | Path, opens: Sequence[Logger] = ()
) -> dict[str, Any]:
  """Runs what the config says; returns what it writes to `results.json`.

  Args:
    config: as a config file's `get_config` makes it.
    workdir: for checkpoints and metrics.
    opens: loggers: see `kdjax.loggers`.

  Raises:
    UserError: for mistakes in the config, the data or the folder.
  """
  configuration.check_keys(config)
  workdir = files.path(workdir)
  files.check(workdir)
  quiet = not processes.lead()
  with progress.at("kdjax", "reading data, checking the config", quiet=quiet):
    checked = experiment(config)
  new = processes.lead() and _claim(workdir, config)
  processes.wait_for_all("claimed")
  seeds = range(config.seed, config.seed + config.seeds)
  try:
    runs = [run(checked, workdir / f"seed_{s}", s, opens) for s in seeds]
  except errors.UserError:
    # Before the first update, as where a logger could not be opened.
    if new and not any(workdir.glob("seed_*/*/metrics.jsonl")):
      _unclaim(workdir)
    raise
  found = results.summary(runs)
  if processes.lead():
    files.write_json(workdir / "results.json", found)
  return found


def _claim(workdir: Path, config: Any) -> bool:
  """Writes the config into a new folder; refuses one of another config.

  Returns:
    Whether it is a new one.

  Raises:
    UserError: it is another config's, or it cannot be written into.
  """
  try:
    with files.reaching(workdir):
      new = not (workdir / "config.json").exists()
      _write_config(workdir, config)
      return new
  except OSError as error:
    raise files.cannot_write(workdir, error.errno or 0) from error


def _unclaim(workdir: Path) -> None:
  """Takes back what `train` has made in a folder that was new."""
  (workdir / "config.json").unlink()
  for folder in workdir.glob("seed_*"):
    files.remove(folder)


def _write_config(workdir: Path, config: Any) -> None:
  ours = json.loads(config.to_json_best_effort())
  path = workdir / "config.json"
  if path.exists():
    theirs = json.loads(path.read_text())
    new, old = configuration.flat(ours), configuration.flat(theirs)
    differing = [
      key
      for key in sorted({*new, *old})
      if key not in _FREE and new.get(key) != old.get(key)
    ]
    if differing:
      raise errors.UserError(
        f"{workdir} was made by another config (differs in "
        f"{', '.join(differing)}): use a new --workdir, or the old config"
      )
  # A start that was killed leaves these two before there is a config.json.
  elif workdir.exists() and {p.name for p in workdir.iterdir()} - {
    "compiled",
    "config.json.part",
  }:
    raise errors.UserError(
      f"{workdir} is not empty and has no config.json: use a new --workdir"
    )
  files.write_json(path, ours)


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""
  return commands.run(
    argv,
    __doc__,
    lambda: processes.run(functools.partial(_run, argv), _CODES),
  )


def _run(argv: Sequence[str]) -> int:
  given = _arguments(argv)
  config, workdir = given.config, given.workdir
  folder = files.path(workdir)
  opens = [loggers.wandb(given.wandb)] if given.wandb else []
  opens += [loggers.named(given.logger)] if given.logger else []
  place = processes.find(
    given.coordinator,
    given.processes,
    given.process,
    seconds=given.start_seconds,
  )
  if place is not None:  # alone, there is nobody to compare with
    processes.initialize(
      place,
      _facts(config, workdir),
      start_seconds=given.start_seconds,
      lost_seconds=given.lost_seconds,
    )
  files.check(folder)
  with files.reaching(folder):
    new = [p for p in (folder / "compiled", folder) if not p.exists()]
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Seeds and restarts run the same programs: compile each of them once.
    cache = files.absolute(folder) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    if files.in_bucket(folder):  # what XLA keeps beside them needs a disk
      jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  try:
    _make(folder)  # before anything is compiled into it
    found = train(config, workdir, opens)
  except errors.UserError:
    if processes.lead():
      _leave_nothing(new)
    raise
  if processes.lead():
    print(results.table(found))
    page = f"python -m kdjax.report {shlex.quote(workdir)}"
    print(f"a page of curves and pictures: {page}", file=sys.stderr)
  return 0


def _make(folder: Path) -> None:
  try:
    with files.reaching(folder):
      folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise files.cannot_write(folder, error.errno or 0) from error


def _facts(config: Any, workdir: str) -> dict[str, dict[str, Any]]:
  """What all processes of a run must have in common."""
  ours = json.loads(config.to_json_best_effort())
  return {
    "config": configuration.flat(ours),
    "command": {"workdir": workdir},
    "version": processes.versions(),
    "code": processes.code(),
  }


def _leave_nothing(new: Sequence[Path]) -> None:
  """Removes the folders of a run that was refused before it began."""
  if any((folder / "config.json").exists() for folder in new):
    return
  for folder in new:
    if folder.name == "compiled":
      files.remove(folder)
    elif folder.exists() and not any(folder.iterdir()):
      folder.rmdir()


class _Arguments(NamedTuple):
  config: Any
  workdir: str
  wandb: str | None
  logger: str | None
  coordinator: str | None
  processes: int | None
  process: int | None
  start_seconds: float
  lost_seconds: float


def _arguments(argv: Sequence[str]) -> _Arguments:
  """The flags; whatever is wrong with them as a UserError."""

  def define(values: flags.FlagValues) -> None:
    for name in ("workdir", "wandb", "logger", "coordinator"):
      flags.DEFINE_string(name, None, "", flag_values=values)
    for name in ("processes", "process"):
      flags.DEFINE_integer(name, None, "", flag_values=values)
    for name, seconds in (("start_seconds", 300.0), ("lost_seconds", 60.0)):
      flags.DEFINE_float(name, seconds, "", lower_bound=1.0, flag_values=values)

  return _Arguments(**configuration.arguments(argv, define, "workdir"))


if __name__ == "__main__":
  sys.exit(main(sys.argv))
