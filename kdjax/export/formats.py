"""What an export writes: `weights`, or a `program`, each with its JSON.

A format is a function `(run, network, program, folder, layout) -> path` of what
is largest in the folder.
"""

from pathlib import Path
from typing import Any

from jax import export

from kdjax import errors, files, pretrained
from kdjax.export import serving
from kdjax.export.finished import Run, Trained

LAYOUTS = ("hub", "torchvision", "timm", "kdjax")


def weights(
  run: Run,
  ours: Trained,
  exported: export.Exported,
  folder: Path,
  layout: str,
) -> Path:
  """model.safetensors and config.json."""
  told = {"kdjax": {**_origin(run, ours), "layout": layout}}
  if layout != "hub":  # `write` makes the hub's
    files.write_json(folder / "config.json", told)
  return pretrained.write(
    folder,
    ours.variables,
    family=ours.family,
    layout=layout,
    arguments=ours.arguments,
    extra_config=told,
  )


def program(
  run: Run,
  ours: Trained,
  exported: export.Exported,
  folder: Path,
  layout: str,
) -> Path:
  """student.stablehlo, or the teacher's, and serving.json."""
  side = "teacher" if ours.name == "teacher" else "student"
  path = folder / f"{side}.stablehlo"
  path.write_bytes(exported.serialize())
  told = {
    "program": path.name,
    "bytes": path.stat().st_size,
    **serving.description(exported),
    **_origin(run, ours),
  }
  files.write_json(folder / "serving.json", told)
  return path


FORMATS = {"safetensors": weights, "stablehlo": program}


def _origin(run: Run, ours: Trained) -> dict[str, Any]:
  """Where the network is from, and what its images went through."""
  c = run.config.data
  side = run.config.teacher if ours.name == "teacher" else run.config.student
  crop = f"kdjax.data.center_crop, size={c.image_size}" if c.image_size else ""
  return {
    "network": ours.name,
    "seed": run.seed,
    "model": side.model.to_dict(),
    "classifier": "own" if ours.family else "teacher",
    "data": c.name,
    "image_shape": list(run.image_shape),
    "resize": crop or "none",
    "normalization": {
      "is": "(image / 255 - mean) / std",
      "mean": list(c.mean),
      "std": list(c.std),
    },
  }


def choose_layout(ours: Trained, layout: str | None) -> str:
  """The layout asked for, else the first of `LAYOUTS` that the family has."""
  known = [x for x in LAYOUTS if x in pretrained.layouts(ours.family)]
  if layout is None:
    return known[0]
  if layout not in known:
    whose = ours.family or "a student with its teacher's classifier"
    raise errors.unknown(f"layout of {whose}", layout, known)
  return layout
