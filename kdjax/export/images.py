"""A run's image classifier: written, and measured beside its teacher."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kdjax import errors, evaluate, simkd
from kdjax.export import serving
from kdjax.export.finished import Located, Run, Trained, open_run, trained
from kdjax.export.formats import FORMATS, choose_layout, program
from kdjax.export.rows import IMAGE, Exported


def export(
  located: Located,
  output: Path,
  network: str,
  format: str,
  layout: str | None,
) -> list[Exported]:
  """See `command.export`."""
  write = FORMATS[format]
  if layout is not None and write is program:
    raise errors.UserError(
      f"--layout={layout} is for safetensors, a program has no names: leave "
      "one of --layout and --format=stablehlo out"
    )
  run = open_run(located)
  ours = trained(run, network)
  layout = choose_layout(ours, layout)
  rows = []
  # First what the comparison needs: the output is then the last that can fail.
  if network != "teacher" and (teacher := _teacher(run)) is not None:
    with tempfile.TemporaryDirectory() as folder:
      rows.append(_measured(run, teacher, write, Path(folder), "kdjax"))
  with _whole(output) as folder:
    return [*rows, _measured(run, ours, write, folder, layout)]


def _measured(
  run: Run, ours: Trained, write: Callable[..., Path], folder: Path, layout: str
) -> Exported:
  exported = serving.program(
    ours.model,
    ours.variables,
    run.image_shape,
    mean=run.config.data.mean,
    std=run.config.data.std,
  )
  path = write(run, ours, exported, folder, layout)
  return Exported(
    ours.name,
    evaluate.num_parameters(simkd.deployed(ours.variables)),
    path.stat().st_size,
    serving.latency(exported),
    IMAGE,
  )


def _teacher(run: Run) -> Trained | None:
  """The teacher to compare with; a student can be exported without it."""
  try:
    return trained(run, "teacher")
  except errors.UserError as error:
    print(f"kdjax: the teacher is not measured: {error}", file=sys.stderr)
    return None


@contextlib.contextmanager
def _whole(output: Path) -> Iterator[Path]:
  """A folder beside `output`, which gets its name when all of it is written."""
  part = output.with_name(f".{output.name}.{os.getpid()}.part")
  try:
    part.mkdir(parents=True)
    yield part
    part.replace(output)
  except OSError as error:
    raise errors.UserError(
      f"cannot write {output}: {error.strerror or error}: name another --output"
    ) from error
  finally:
    shutil.rmtree(part, ignore_errors=True)
