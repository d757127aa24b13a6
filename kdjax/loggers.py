"""Where else numbers go: Weights & Biases, or a logger of your own.

A logger is a function `(folder, config)` that returns a context manager. Its
value is called with `(step, metrics)` as training goes on:

    @contextlib.contextmanager
    def logger(folder, config):        # of a phase: .../seed_0/student_alone
      with open(folder.name + ".txt", "a") as file:
        yield lambda step, metrics: print(step, metrics, file=file)

A folder in a bucket (`gs://...`) has pathlib's methods too.

`python -m kdjax.train --logger=MODULE:logger` opens it for every phase that
trains, on process 0 alone, and closes it however the phase ends.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import errors, files, processes
from kdjax.metrics import last_step

OnMetrics = Callable[[int, Mapping[str, float]], None]
Logger = Callable[
  [Path, Mapping[str, Any]], contextlib.AbstractContextManager[OnMetrics]
]


def named(name: str) -> Logger:
  """The logger `MODULE:NAME`.

  Raises:
    UserError: there is none.
  """
  module, _, function = name.partition(":")
  if not (module and function):
    raise errors.UserError(
      f"--logger is {name!r}, must be MODULE:NAME, such as my_loggers:mlflow"
    )
  try:
    there = vars(importlib.import_module(module))
  # A module is a program, and anything may go wrong in it.
  except Exception as error:
    hint = ""
    if isinstance(error, ModuleNotFoundError):
      hint = ": it must lie in this folder, be installed, or be on PYTHONPATH"
    raise errors.UserError(
      f"cannot import --logger {name}: {errors.told(error)}{hint}"
    ) from error
  functions: dict[str, Any] = {k: v for k, v in there.items() if callable(v)}
  return errors.choose(f"logger of {module}", function, functions)


def wandb(project: str) -> Logger:
  """A run of Weights & Biases for each phase and seed, in one group a workdir.

  Its own settings are read from its environment variables: WANDB_ENTITY,
  WANDB_MODE, WANDB_TAGS and so on. A phase that goes on after a kill goes on in
  the same run, whose id is kept in `wandb.json`. Steps that were sent before
  the kill are not sent again.

  Raises:
    UserError: the package is missing.
  """
  if importlib.util.find_spec("wandb") is None:
    raise errors.UserError(
      "--wandb needs the package wandb, which is not installed: "
      "pip install 'kdjax[wandb]'"
    )
  return functools.partial(wandb_run, project)


@contextlib.contextmanager
def wandb_run(
  project: str, folder: Path, config: Mapping[str, Any]
) -> Iterator[OnMetrics]:
  """The logger that `wandb` returns; `folder` ends in seed and network."""
  api = importlib.import_module("wandb")
  path, sent = folder / "wandb.json", 0
  if path.exists():
    key = json.loads(path.read_text())["id"]
    sent = last_step(folder / "metrics.jsonl")
  else:
    key = uuid.uuid4().hex[:8]
    files.write_json(path, {"id": key})
  place = files.absolute(folder)
  run = api.init(
    project=project,
    id=key,
    resume="allow",
    name="/".join(place.parts[-3:]),
    group=place.parents[1].name,
    job_type=folder.name,
    config=dict(config),
    dir=None if files.in_bucket(folder) else str(folder),
    # What the terminal shows stays as it is.
    settings=api.Settings(console="off", quiet=True),
  )

  def log(step: int, metrics: Mapping[str, float]) -> None:
    # Steps may not go backwards. What is sent twice of one step is merged.
    if step >= max(sent, run.step):
      run.log(dict(metrics), step=step)

  # Not `with run`, which prints a traceback of what is told in a line.
  try:
    yield log
  except BaseException:
    run.finish(exit_code=1)
    raise
  run.finish()


@contextlib.contextmanager
def opened(
  loggers: Sequence[Logger], folder: Path, config: Mapping[str, Any]
) -> Iterator[OnMetrics | None]:
  """All of them for a phase, as one function; None where there is none.

  Raises:
    UserError: one could not be opened.
  """
  if not (loggers and processes.lead()):
    yield None
    return
  with contextlib.ExitStack() as stack:
    sinks = []
    for logger in loggers:
      try:
        sink = stack.enter_context(logger(folder, config))
      except Exception as error:
        raise errors.UserError(
          f"the logger {_name(logger)} could not be opened: "
          f"{errors.told(error)}"
        ) from error
      sinks.append(guarded(sink, _name(logger)))

    def log(step: int, metrics: Mapping[str, float]) -> None:
      for sink in sinks:
        sink(step, metrics)

    yield log


def guarded(on_metrics: OnMetrics, name: str = "") -> OnMetrics:
  """The same, whose failure is a mistake of the caller's that is named.

  It gets a copy, so that nothing it does can change the run.

  Raises:
    UserError: in place of any other exception.
  """
  name = name or _name(on_metrics)

  def call(step: int, metrics: Mapping[str, float]) -> None:
    try:
      on_metrics(step, dict(metrics))
    except errors.UserError:
      raise
    except Exception as error:
      raise errors.UserError(
        f"on_metrics, {name}, failed at step {step}: {errors.told(error)}: "
        "mend it or leave it out; the run goes on from its last checkpoint"
      ) from error

  return call


def _name(function: Any) -> str:
  function = getattr(function, "func", function)  # of a partial
  name = getattr(function, "__qualname__", type(function).__name__)
  return f"{getattr(function, '__module__', '')}.{name}".lstrip(".")
