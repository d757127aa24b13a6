"""Small networks of each family, and weights drawn by their names.

Golden files hold names, shapes and logits; the weights are drawn again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from abstract import OneKey
from flax import nnx

from kdjax import adapters, models
from kdjax.models.layers import ConvNorm, max_pool

CLASSES = 7


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  family: str
  build: Callable[..., Any]
  image: tuple[int, int]
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def model(self):
    more = {"num_classes": CLASSES, **self.arguments}
    # No initialiser's value is used, and their trace is long.
    return adapters.from_nnx(lambda _: self.build(**more, rngs=OneKey(0)))

  @property
  def batch(self):
    rng = np.random.default_rng(0)
    return {"image": rng.uniform(-1, 1, (2, *self.image, 3)).astype("f")}

  @functools.cached_property
  def shapes(self):
    return jax.eval_shape(self.model.init, jax.random.key(0), self.batch)


def resnet(blocks, widths, stem, expansion, *, num_classes, rngs):
  """A `models.ResNet` of odd sizes."""
  shared = {"dtype": jnp.float32, "rngs": rngs}
  layer = functools.partial(ConvNorm, axis_name=None, **shared)
  return models.ResNet(
    layer(3, stem, 7, 2, activation=nnx.relu),
    blocks,
    widths,
    pool=max_pool,
    inputs=stem,
    expansion=expansion,
    num_classes=num_classes,
    layer=layer,
    **shared,
  )


def _resnet(*sizes):
  return Network("resnet", functools.partial(resnet, *sizes), (33, 49))


def _vit(**arguments):
  tiny = dict(size="tiny", patch=4, depth=2, width=12, heads=3, mlp_width=20)
  more = {"image_size": (8, 12), **tiny, **arguments}
  side = more["image_size"]
  image = side if isinstance(side, tuple) else (side, side)
  return Network("vit", models.vit, image, more)


def _mobilenet_v2(**arguments):
  more = {"width": 0.35, **arguments}
  return Network("mobilenet_v2", models.mobilenet_v2, (33, 47), more)


NETWORKS = {
  "resnet_basic": _resnet((1, 2, 1), (5, 9, 11), 6, 0),
  "resnet_timm": _resnet((1, 2, 1, 1), (5, 9, 11, 4), 64, 0),
  "resnet_bottleneck": _resnet((2, 1), (3, 5), 6, 4),
  "resnet_18": Network("resnet", models.resnet, (33, 49), {"depth": 18}),
  "shufflenet_v2": Network(
    "shufflenet_v2", models.shufflenet_v2, (65, 49), {"width": 0.5}
  ),
  "mobilenet_v2": _mobilenet_v2(),
  "mobilenet_v2_tensorflow": _mobilenet_v2(padding="same", epsilon=1e-3),
  "mobilenet_v3": Network(
    "mobilenet_v3",
    models.mobilenet_v3,
    (33, 47),
    {"size": "small", "epsilon": 1e-3},
  ),
  "mobilenet_v3_large_timm": Network(
    "mobilenet_v3",
    models.mobilenet_v3,
    (33, 47),
    {"size": "large", "epsilon": 1e-5},
  ),
  "vit": _vit(epsilon=1e-3),
  "vit_timm": _vit(),
  "vit_square": _vit(image_size=8),
  "deit": _vit(distilled=True, epsilon=1e-12),
  "deit_timm": _vit(distilled=True),
  "deit_one_head": _vit(distilled=True, distillation_head=False, epsilon=1e-12),
}


def draw(shapes: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
  """Tensors of these shapes, each from its name: activations stay near 1."""
  drawn = {}
  for n, (name, shape) in enumerate(sorted(shapes.items())):
    rng = np.random.default_rng((seed, n))
    low, high = -0.3, 0.3
    if name.endswith("running_var"):
      low, high = 0.5, 1.5
    elif len(shape) == 1 and name.endswith("weight"):
      low, high = 0.7, 1.3
    elif len(shape) > 1 and name.endswith("weight"):
      high = math.sqrt(4 / math.prod(shape[1:]))
      low = -high
    elif name.endswith("num_batches_tracked"):
      drawn[name] = np.zeros(shape, np.int64)
      continue
    drawn[name] = rng.uniform(low, high, shape).astype(np.float32)
  return drawn
