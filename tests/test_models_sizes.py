"""Parameters and multiply-adds of every network against the published code's.

The figures were counted once in the published code, by PyTorch's own counter of
operations: torchvision's networks, and RepDistiller's for 32 px. Nothing here
is compiled or run.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from abstract import abstract
from flax import nnx

from kdjax import evaluate, models

# name, sizes, parameters, multiply-adds of convolutions and linear layers.
# Rounded, they are the papers' figures in millions.
CIFAR = [
  ("resnet_cifar", dict(depth=8), 83_892, 12_507_392),
  ("resnet_cifar", dict(depth=14), 181_108, 26_663_168),
  ("resnet_cifar", dict(depth=20), 278_324, 40_818_944),
  ("resnet_cifar", dict(depth=32), 472_756, 69_130_496),
  ("resnet_cifar", dict(depth=44), 667_188, 97_442_048),
  ("resnet_cifar", dict(depth=56), 861_620, 125_753_600),
  ("resnet_cifar", dict(depth=110), 1_736_564, 253_155_584),
  (
    "resnet_cifar",
    dict(depth=8, width=64, stem_width=32),
    1_233_540,
    177_071_104,
  ),
  (
    "resnet_cifar",
    dict(depth=32, width=64, stem_width=32),
    7_433_860,
    1_083_040_768,
  ),
  ("wrn", dict(depth=16, width=1), 180_916, 26_663_168),
  ("wrn", dict(depth=16, width=2), 703_284, 101_118_464),
  ("wrn", dict(depth=40, width=1), 569_780, 83_286_272),
  ("wrn", dict(depth=40, width=2), 2_255_156, 327_610_880),
  ("vgg_cifar", dict(depth=8), 3_965_028, 96_192_512),
  ("vgg_cifar", dict(depth=11), 9_277_284, 209_438_720),
  ("vgg_cifar", dict(depth=13), 9_462_180, 284_936_192),
  ("vgg_cifar", dict(depth=16), 14_774_436, 398_182_400),
  ("vgg_cifar", dict(depth=19), 20_086_692, 511_428_608),
  ("mobilenet_v2_cifar", dict(), 812_836, 6_523_648),
  ("shufflenet_v1_cifar", dict(), 949_258, 38_691_456),
  ("shufflenet_v2_cifar", dict(), 1_355_528, 44_504_448),
]
IMAGENET = [
  ("resnet", dict(depth=18), 11_689_512, 1_814_073_344),
  ("resnet", dict(depth=34), 21_797_672, 3_663_761_408),
  ("resnet", dict(depth=50), 25_557_032, 4_089_184_256),
  ("resnet", dict(depth=101), 44_549_160, 7_801_405_440),
  ("resnet", dict(depth=152), 60_192_808, 11_513_626_624),
  # 4.2 million and 569 million in the paper, table 8.
  ("mobilenet_v1", dict(), 4_231_976, 568_740_352),
  ("mobilenet_v2", dict(), 3_504_872, 300_774_272),
  ("mobilenet_v3", dict(size="large"), 5_483_032, 216_589_760),
  ("mobilenet_v3", dict(size="small"), 2_542_856, 56_510_400),
  ("shufflenet_v2", dict(width=0.5), 1_366_792, 40_476_448),
  ("shufflenet_v2", dict(width=1.0), 2_278_604, 144_907_992),
  ("shufflenet_v2", dict(width=1.5), 3_503_624, 295_759_392),
  ("shufflenet_v2", dict(width=2.0), 7_393_996, 583_253_464),
]


def multiply_adds(jaxpr):
  total = 0
  for eqn in jaxpr.eqns:
    outputs = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape  # height, width, inputs / groups, out
      total += outputs * math.prod(kernel[:3])
    elif eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      summed = [eqn.invars[0].aval.shape[axis] for axis in contracted]
      total += outputs * math.prod(summed)
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += multiply_adds(inner)
  return total


CASES = [(*row, 32, 100) for row in CIFAR]
CASES += [(*row, 224, 1000) for row in IMAGENET]


@pytest.mark.parametrize(
  ("name", "sizes", "parameters", "operations", "size", "num_classes"),
  CASES,
  ids=[
    "-".join([name, *map(str, sizes.values())]) for name, sizes, *_ in CASES
  ],
)
def test_sizes_are_those_of_the_published_code(
  name, sizes, parameters, operations, size, num_classes
):
  module = abstract(
    lambda rngs: models.MODELS[name](
      **sizes, num_classes=num_classes, rngs=rngs
    )
  )
  module.eval()
  params = jax.tree.leaves(nnx.state(module, nnx.Param))
  assert evaluate.num_parameters(params) == parameters
  graphdef, state = nnx.split(module)
  jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x).logits)(
    state, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  )
  assert multiply_adds(jaxpr.jaxpr) == operations
