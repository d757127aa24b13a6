"""A network as one program that needs no kdjax, and how long a call takes."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, UInt8

from kdjax.types import Model, Variables

PLATFORMS = ("cpu", "cuda", "tpu")
_CALLS, _SECONDS = 200, 10.0


class Latency(NamedTuple):
  """The median of `calls` calls, in seconds."""

  median: float
  calls: int


def program(
  model: Model,
  variables: Variables,
  image_shape: tuple[int, int, int],
  *,
  mean: float | Sequence[float],
  std: float | Sequence[float],
) -> export.Exported:
  """logits = network((image / 255 - mean) / std), for any batch size.

  image is uint8 `[b, H, W, C]`, the logits are float32 `[b, classes]`. The
  values of the network are constants of the program. It is lowered for each of
  `PLATFORMS`, whatever this machine has.

  Args:
    model: the network; it is called with `train=False`.
    variables: its `(params, stats)`.
    image_shape: (H, W, C).
    mean, std: of a channel on 0..1, one number or one a channel.
  """
  params, stats = variables
  means, stds = (
    np.reshape(np.asarray(x, np.float32), (1, 1, 1, -1)) for x in (mean, std)
  )

  def serve(image: UInt8[Array, "b h w c"]) -> Float[Array, "b classes"]:
    x = (image.astype(jnp.float32) / 255 - means) / stds
    output, _ = model.apply(params, stats, {"image": x}, train=False)
    return output.logits.astype(jnp.float32)

  (b,) = export.symbolic_shape("b")
  image = jax.ShapeDtypeStruct((b, *image_shape), jnp.uint8)
  return export.export(jax.jit(serve), platforms=PLATFORMS)(image)


def latency(exported: export.Exported) -> Latency:
  """How long one image takes, from host memory to logits in host memory."""
  call = jax.jit(exported.call)
  shape = exported.in_avals[0].shape[1:]
  image = np.random.default_rng(0).integers(256, size=(1, *shape))
  image = image.astype(np.uint8)
  return timed(lambda: np.asarray(call(image)))


def timed(
  call: Callable[[], Any], *, warm_up: int = 10, fewest: int = 20
) -> Latency:
  """The median time of a call, which returns when all is done."""
  for _ in range(warm_up):
    call()
  times: list[float] = []
  while len(times) < fewest or (len(times) < _CALLS and sum(times) < _SECONDS):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return Latency(float(np.median(times)), len(times))


def device() -> str:
  """What the programs are measured on, in words."""
  used = jax.devices()[0]
  if used.platform != "cpu":
    return used.device_kind
  named = "an unnamed processor"
  if (info := Path("/proc/cpuinfo")).exists():
    lines = (line.partition(":") for line in info.read_text().splitlines())
    models = (value for key, _, value in lines if key.strip() == "model name")
    named = " ".join(next(models, named).split())
  return f"{os.cpu_count()} CPU cores ({named})"


def description(exported: export.Exported) -> dict[str, Any]:
  """What whoever serves the program must know, as JSON."""
  (image,), (logits,) = exported.in_avals, exported.out_avals
  return {
    "input": {
      "shape": _shape(image),
      "dtype": str(image.dtype),
      "is": "images [batch, height, width, channels], 0 to 255, not normalised",
    },
    "output": {
      "shape": _shape(logits),
      "dtype": str(logits.dtype),
      "is": "logits [batch, classes], before the softmax",
    },
    "num_classes": logits.shape[-1],
    "platforms": list(exported.platforms),
    "jax": jax.__version__,
    "calling_convention_version": exported.calling_convention_version,
  }


def _shape(aval: Any) -> list[int | str]:
  return [n if isinstance(n, int) else str(n) for n in aval.shape]
