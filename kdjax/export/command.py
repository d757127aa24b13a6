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

A language model becomes a folder that transformers and vLLM load: config.json,
safetensors and the tokenizer; --format and --layout are for image classifiers.

It ends with the sizes of teacher and student, and how long either takes for one
image, or for a token, on this machine. Exit codes: 0 done, 2 a mistake that the
message explains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from kdjax import commands, errors, files
from kdjax.export import images, texts
from kdjax.export.finished import PHASES, locate
from kdjax.export.formats import FORMATS
from kdjax.export.rows import Exported, table


def export(
  workdir: str | Path,
  output: str | Path,
  *,
  network: str = "student_distilled",
  seed: int | None = None,
  format: str | None = None,
  layout: str | None = None,
) -> list[Exported]:
  """Writes a network of a run to `output`, which appears whole or not at all.

  Of images "safetensors": model.safetensors and a config.json; "stablehlo": the
  program of `serving.program`, serialised by `jax.export`, and a serving.json.
  Of texts what `AutoModelForCausalLM.from_pretrained` loads.

  Returns:
    What was measured: the teacher first, if it can be read, then the network.

  Raises:
    UserError: `output` is in use; an unknown network, seed, format or layout;
      no run in `workdir`, or no checkpoint of the network.
  """
  errors.choose("network", network, PHASES)
  errors.choose("format", format or "safetensors", FORMATS)
  if files.in_bucket(output):
    raise errors.UserError(
      f"--output {output} is in a bucket, must be a folder: export into one, "
      "and copy it"
    )
  output = Path(output).resolve()
  _check_free(output)
  run = locate(workdir, seed)
  if run.config.task == "image":
    chosen = format or "safetensors"
    return images.export(run, output, network, chosen, layout)
  if format == "stablehlo" or layout:
    raise errors.UserError(
      f"{workdir} is a language model, which is written as transformers reads "
      "it: leave --format and --layout out"
    )
  return texts.export(run, output, network)


def _check_free(output: Path) -> None:
  if output.is_file() or (output.is_dir() and any(output.iterdir())):
    raise errors.UserError(
      f"{output} exists and is not empty: name another --output, or remove it"
    )


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""
  stopped = "stopped, nothing is written"
  return commands.run(argv, __doc__, lambda: _run(argv), stopped=stopped)


def _run(argv: Sequence[str]) -> int:
  print(table(export(**_arguments(argv))))
  return 0


def _arguments(argv: Sequence[str]) -> dict[str, Any]:
  """The arguments of `export`; whatever is wrong with them as a UserError."""

  def define(values: flags.FlagValues) -> None:
    for name in ("workdir", "output", "network", "format", "layout"):
      flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_integer("seed", None, "", flag_values=values)

  given, rest = commands.parse(argv, define)
  commands.refuse(rest)
  commands.require(given, "workdir", "output")
  return {name: value for name, value in given.items() if value is not None}
