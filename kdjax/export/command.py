"""Writes a run's student for others to load or to serve, and compares it.

    python -m kdjax.export --workdir=runs/digits --output=student

  --workdir=FOLDER  of a run of kdjax.train
  --output=FOLDER   is made; it must not exist, or be empty
  --network=NAME    student_distilled (default), student_alone or teacher
  --seed=NUMBER     default: the run's first
  --format=NAME     safetensors (default): the weights, for this or for another
                    library; stablehlo: a program with the weights inside
  --layout=NAME     whose names the safetensors have: hub, torchvision, timm,
                    kdjax; default: the first of them that the network's family
                    has, kdjax always
  --help            this text

It ends with the sizes on disk of teacher and student, and how long either takes
for one image on this machine. Exit codes: 0 done, 2 a mistake that the message
explains.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from kdjax import errors, evaluate, report, simkd
from kdjax.export import serving
from kdjax.export.finished import PHASES, Run, Trained, open_run, trained
from kdjax.export.formats import FORMATS, choose_layout, program


class Exported(NamedTuple):
  """What is told of a network.

  Attributes:
    network: its name.
    parameters: how many numbers are trained, an inherited classifier's too.
    size: bytes on disk of the weights or of the program.
    latency: of the program, with one image.
  """

  network: str
  parameters: int
  size: int
  latency: serving.Latency


def export(
  workdir: str | Path,
  output: str | Path,
  *,
  network: str = "student_distilled",
  seed: int | None = None,
  format: str = "safetensors",
  layout: str | None = None,
) -> list[Exported]:
  """Writes a network of a run to `output`, which appears whole or not at all.

  "safetensors": model.safetensors and a config.json. "stablehlo": the program
  of `serving.program`, serialised by `jax.export`, and a serving.json.

  Returns:
    What was measured: the teacher first, if it can be read, then the network.

  Raises:
    UserError: `output` is in use; an unknown network, seed, format or layout;
      no run in `workdir`, or no checkpoint of the network.
  """
  errors.choose("network", network, PHASES)
  write = errors.choose("format", format, FORMATS)
  if layout is not None and write is program:
    raise errors.UserError(
      f"--layout={layout} is for safetensors, a program has no names: leave "
      "one of --layout and --format=stablehlo out"
    )
  output = Path(output).resolve()
  _check_free(output)
  run = open_run(workdir, seed)
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
  )


def _teacher(run: Run) -> Trained | None:
  """The teacher to compare with; a student can be exported without it."""
  try:
    return trained(run, "teacher")
  except errors.UserError as error:
    print(f"kdjax: the teacher is not measured: {error}", file=sys.stderr)
    return None


def _check_free(output: Path) -> None:
  if output.is_file() or (output.is_dir() and any(output.iterdir())):
    raise errors.UserError(
      f"{output} exists and is not empty: name another --output, or remove it"
    )


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


def table(rows: Sequence[Exported]) -> str:
  """A row a network; then, of two, the teacher's share to the student's."""
  cells = [["", "parameters", "bytes on disk", "ms for one image"]]
  for row in rows:
    cells.append(
      [
        row.network.replace("_", " "),
        f"{row.parameters:,}",
        f"{row.size:,}",
        f"{1e3 * row.latency.median:.3f}",
      ]
    )
  if len(rows) == 2:
    teacher, student = rows
    cells.append(
      [
        "teacher / student",
        f"{teacher.parameters / student.parameters:.2f}",
        f"{teacher.size / student.size:.2f}",
        f"{teacher.latency.median / student.latency.median:.2f}",
      ]
    )
  calls = " and ".join(dict.fromkeys(str(r.latency.calls) for r in rows))
  return "\n".join(
    [
      *report.aligned(cells),
      f"ms: median of {calls} calls of the exported program on "
      f"{serving.device()}, from",
      "uint8 in host memory to logits in host memory, compilation and warm-up "
      "left out",
    ]
  )


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""
  # Orbax and TFDS tell of their progress in the log.
  logging.getLogger().setLevel(logging.ERROR)
  if len(argv) == 1 or set(argv) & {"--help", "-h"}:
    print((__doc__ or "").strip())
    return 2 if len(argv) == 1 else 0
  try:
    rows = export(**_arguments(argv))
  except errors.UserError as error:
    print(f"kdjax: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("kdjax: stopped, nothing is written", file=sys.stderr)
    return 130
  print(table(rows))
  return 0


def _arguments(argv: Sequence[str]) -> dict[str, Any]:
  """The arguments of `export`; whatever is wrong with them as a UserError."""
  values = flags.FlagValues()
  for name in ("workdir", "output", "network", "format", "layout"):
    flags.DEFINE_string(name, None, "", flag_values=values)
  flags.DEFINE_integer("seed", None, "", flag_values=values)
  try:
    rest = values(list(argv))[1:]
  except flags.Error as error:
    raise errors.UserError(
      f"cannot use the arguments: {' '.join(str(error).split())}"
    ) from error
  given = {
    name: value
    for name, value in values.flag_values_dict().items()
    if value is not None
  }
  for name in ("workdir", "output"):
    if not given.get(name):
      raise errors.UserError(f"--{name} is missing: see --help")
  if rest:
    raise errors.UserError(f"got {' '.join(rest)}: see --help")
  return given
