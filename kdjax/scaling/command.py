"""What a config's distilled step takes on devices that are not here.

    python -m kdjax.scaling --config=configs/llm_8b_1b.py:64 --topology=v5e:8x8
    python -m kdjax.scaling --config=configs/digits.py --devices=8

  --config=FILE[:ARG]   as for kdjax.train; --config.NAME=VALUE too
  --topology=CHIP:SHAPE TPUs: v5e, v5p or v6e, such as v5e:16x16, v5p:4x4x4
  --slices=N            so many of them, joined by the data center's network
  --devices=N           instead: N simulated devices of this CPU
  --json=FILE           the figures, for programs
  --hlo=FILE            the compiled program's text
  --help                this text

The step is compiled and never run. No TPU is needed, no data set, no weights:
shapes are enough. `pip install 'jax[tpu]'` brings the compiler for TPUs.
data.batch_size is that of all devices together.

FLOPs are those of the matrix products and convolutions of the step as traced,
loops counted as often as they run, shared equally by the devices; `model` are
those without what is computed twice (`kdjax.flops`). Collectives and traffic
are read from the compiled program (`kdjax.hlo`). The time is a bound from below
(`kdjax.chips`): compute, memory and links overlap wholly and are at their most.
Exit codes: 0 done, 2 a mistake that the message explains.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

import kdjax.config as configuration
from kdjax import commands, errors, files
from kdjax.scaling.devices import described, simulated
from kdjax.scaling.figures import measure
from kdjax.scaling.tables import content, table


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""
  return commands.run(argv, __doc__, lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
  given = configuration.arguments(argv, _define)
  for name in ("json", "hlo"):
    if given[name] and not os.access(Path(given[name]).parent, os.W_OK):
      raise errors.UserError(
        f"cannot write --{name}={given[name]}: name a file in a folder that "
        "exists and can be written to"
      )
  figures = measure(
    given["config"], _devices(given), given["hlo"] and Path(given["hlo"])
  )
  print(table(figures))
  if given["json"]:
    files.write_json(Path(given["json"]), content(figures))
  return 0


def _define(values: flags.FlagValues) -> None:
  for name in ("topology", "json", "hlo"):
    flags.DEFINE_string(name, None, "", flag_values=values)
  for name, default in (("devices", None), ("slices", 1)):
    flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=values)


def _devices(given: dict[str, Any]) -> list[Any]:
  topology, count = given["topology"], given["devices"]
  if bool(topology) == bool(count):
    raise errors.UserError(
      f"got --topology={topology}, --devices={count}: give one of the two"
    )
  if count:
    return simulated(count)
  jax.config.update("jax_platforms", "cpu")
  return described(topology, given["slices"])
