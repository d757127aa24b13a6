"""Trains (or loads) a teacher, trains a student alone, distils it, compares.

    python -m kdjax.train --config=configs/digits.py --workdir=runs/digits

  --config=FILE[:ARG]   a config file; `configs/digits.py:smoke` takes seconds
  --config.NAME=VALUE   another value for one of its keys, such as
                        --config.alpha=0.5 or --config.phases.alone.steps=900
  --workdir=FOLDER      for checkpoints, metrics and results.json
  --help                this text

Killed and started again, the same line goes on where it was; on SIGTERM it
saves first. Exit codes: 0 done, 2 a mistake that the message explains, 143
stopped by SIGTERM.
"""

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

import kdjax.config as configuration
from kdjax import errors, metrics, preemption, report
from kdjax.experiment import experiment, run


def train(config: Any, workdir: str | Path) -> dict[str, Any]:
  """Runs what the config says; returns what it writes to `results.json`.

  Raises:
    UserError: for mistakes in the config, the data or the folder.
  """
  configuration.check_keys(config)
  workdir = Path(workdir)
  checked = experiment(config)
  _claim(workdir, config)
  seeds = range(config.seed, config.seed + config.seeds)
  runs = [run(checked, workdir / f"seed_{s}", s) for s in seeds]
  results = report.summary(runs)
  metrics.write_json(workdir / "results.json", results)
  return results


def _claim(workdir: Path, config: Any) -> None:
  """Writes the config into a new folder; refuses one of another config.

  Raises:
    UserError: it is another config's, or it cannot be written into.
  """
  try:
    _write_config(workdir, config)
  except OSError as error:
    raise errors.UserError(
      f"cannot write into --workdir {workdir} ({error.strerror}): use another"
    ) from error


def _write_config(workdir: Path, config: Any) -> None:
  ours = json.loads(config.to_json_best_effort())
  path = workdir / "config.json"
  if path.exists():
    theirs = json.loads(path.read_text())
    # More seeds may be added to what is there: each has a folder of its own.
    new, old = configuration.flat(ours), configuration.flat(theirs)
    differing = [
      key
      for key in sorted({*new, *old})
      if key != "seeds" and new.get(key) != old.get(key)
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
  metrics.write_json(path, ours)


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""
  # Orbax and TFDS tell of their progress in the log.
  logging.getLogger().setLevel(logging.ERROR)
  if len(argv) == 1 or set(argv) & {"--help", "-h"}:
    print((__doc__ or "").strip())
    return 2 if len(argv) == 1 else 0
  new: list[Path] = []
  try:
    config, workdir = _arguments(argv)
    new = [
      p for p in (Path(workdir) / "compiled", Path(workdir)) if not p.exists()
    ]
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      # Seeds and restarts run the same programs: compile each of them once.
      folder = Path(workdir).absolute() / "compiled"
      jax.config.update("jax_compilation_cache_dir", str(folder))
    results = train(config, workdir)
  except errors.UserError as error:
    print(f"kdjax: {error}", file=sys.stderr)
    _leave_nothing(new)
    return 2
  except KeyboardInterrupt:
    print("kdjax: stopped; the same command goes on from here", file=sys.stderr)
    return 130
  except preemption.Preempted as told:
    print(f"kdjax: {told}", file=sys.stderr)
    return 128 + signal.SIGTERM
  print(report.table(results))
  return 0


def _leave_nothing(new: Sequence[Path]) -> None:
  """Removes the folders of a run that was refused before it began."""
  if any((folder / "config.json").exists() for folder in new):
    return
  for folder in new:
    if folder.name == "compiled":
      shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists() and not any(folder.iterdir()):
      folder.rmdir()


def _arguments(argv: Sequence[str]) -> tuple[Any, str]:
  """(config, workdir); whatever is wrong with them as a UserError."""
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=list(argv)
  )
  workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
  try:
    rest = values(list(argv))[1:]
    if config.value is not None:
      config.value.keys()  # a file that failed to load says so only when read
  # A config is a program, and anything may go wrong in it.
  except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise errors.UserError(
      f"cannot use the arguments: {'; '.join(lines)}"
    ) from (error)
  for name, value in {"config": config.value, "workdir": workdir.value}.items():
    if value is None:
      raise errors.UserError(f"--{name} is missing: see --help")
  if rest:
    raise errors.UserError(f"got {' '.join(rest)}: see --help")
  return config.value, workdir.value or ""


if __name__ == "__main__":
  sys.exit(main(sys.argv))
