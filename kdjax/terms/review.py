"""ReviewKD: a student's stages, fused from deep to shallow, learn a teacher's.

The source is Chen et al. 2021, arXiv 2104.09044, section 3, and its code.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from kdjax import errors
from kdjax.losses import features, maps
from kdjax.objective import Names, Term, each
from kdjax.projectors import batch_norm, convolve, normalizing
from kdjax.types import Batch, ScalarOrSchedule

Spec = Any  # jax.ShapeDtypeStruct
_uniform = jax.nn.initializers.lecun_uniform()


def review(
  name: str,
  taps: tuple[Names, Names],
  *,
  weight: ScalarOrSchedule,
  levels: Sequence[int] = (4, 2, 1),
  mid_channels: int = 512,
) -> Term:
  """Σ over stages of `losses.review`(fused student, teacher).

  From the deepest stage up, `fuse` joins each of the student's maps with what
  came from the stage below it, and the result learns that stage's teacher.

  Args:
    taps: the stages of each network, as many on both sides, from shallow to
      deep: maps, or a vector (the pooled features) as a map of one position.
    levels: sizes that `losses.review` pools to.
    mid_channels: of the fusion; at most those of the student's deepest tap.

  Raises:
    UserError: if the two sides have not as many taps, or, when initialised, if
      one is no map or vector.
  """
  taps = each(taps[0]), each(taps[1])
  if len(taps[0]) != len(taps[1]):
    raise errors.UserError(
      f"term {name!r} got {len(taps[0])} student and {len(taps[1])} teacher "
      "taps: give as many on both sides, from shallow to deep"
    )
  depth = len(taps[0])

  def init(
    key: Array, student: tuple[Spec, ...], teacher: tuple[Spec, ...]
  ) -> tuple[PyTree, PyTree]:
    for spec in (*student, *teacher):
      if len(spec.shape) != 2:
        maps.spatial_size(spec)
    mid = min(mid_channels, student[-1].shape[-1])
    return {
      f"stage_{n}": _stage(
        jax.random.fold_in(key, n),
        (student[n].shape[-1], mid, teacher[n].shape[-1]),
        deepest=n == depth - 1,
      )
      for n in range(depth)
    }, {}

  def loss(
    params: PyTree,
    state: PyTree,
    student: tuple[Array, ...],
    teacher: tuple[Array, ...],
    batch: Batch,
    key: Array,
    *,
    levels: Sequence[int],
  ) -> tuple[Array, PyTree]:
    where = jnp.asarray(batch["mask"]) > 0
    total, below = jnp.zeros(where.shape), None
    for n in reversed(range(depth)):
      target = _map(teacher[n])
      fused, below = fuse(
        params[f"stage_{n}"],
        jnp.asarray(_map(student[n]), jnp.float32),
        below,
        maps.spatial_size(target),
        where,
      )
      total += features.review(fused, target, levels=levels)
    return total, state

  return Term(
    name,
    loss,
    weight,
    hparams={"levels": tuple(levels)},
    taps=taps,
    init=init,
    couples=True,
  )


def fuse(
  params: PyTree,
  x: Float[Array, "b h w c"],
  below: Float[Array, "b h2 w2 mid"] | None,
  size: tuple[int, int],
  where: Array,
) -> tuple[Float[Array, "b h3 w3 c2"], Float[Array, "b h3 w3 mid"]]:
  """Attention-based fusion (ABF): (BN(conv3x3(z)), z), z = a₁ · x′ + a₂ · y.

  x′ = BN(conv1x1(x)), y is what came from below at the size of x, and (a₁, a₂)
  = sigmoid(conv1x1([x′, y])) weighs the two at each position. The deepest stage
  has no y: z = x′. Before its convolution z is brought to the teacher's size.

  Args:
    params: of the stage.
    x: the student's map.
    below: z of the stage below; None at the deepest.
    size: height and width of the teacher's map.
    where: [B], true for the examples that exist.
  """
  scale, bias = _affine(params["norm1"])
  centred, kernel = normalizing(x, params["conv1"], where)
  kernel = kernel * scale[0, 0]
  z = centred @ kernel + bias
  if below is not None:
    here = maps.spatial_size(x)

    def share(n: int) -> Array:
      # [x', y] times the kernel by way of x and `below`, which are smaller.
      of_z, of_y = jnp.split(params["attention"][:, n : n + 1], 2)
      mine = centred @ (kernel @ of_z) + bias @ of_z
      score = below @ of_y + params["attention_bias"][n]
      return jax.nn.sigmoid(mine + _nearest(score, here))

    z = share(0) * z + share(1) * _nearest(below, here)
  z = _nearest(z, size)
  scale, bias = _affine(params["norm2"])
  return batch_norm(convolve(z, params["conv2"]), where) * scale + bias, z


def _stage(
  key: Array, channels: tuple[int, int, int], *, deepest: bool
) -> dict[str, Any]:
  inputs, mid, outputs = channels
  keys = jax.random.split(key, 3)
  stage: dict[str, Any] = {
    "conv1": _uniform(keys[0], (inputs, mid), jnp.float32),
    "norm1": {"scale": jnp.ones(mid), "bias": jnp.zeros(mid)},
    "conv2": _uniform(keys[1], (3, 3, mid, outputs), jnp.float32),
    "norm2": {"scale": jnp.ones(outputs), "bias": jnp.zeros(outputs)},
  }
  if not deepest:
    stage["attention"] = _uniform(keys[2], (2 * mid, 2), jnp.float32)
    stage["attention_bias"] = jnp.zeros(2)
  return stage


def _affine(norm: dict[str, Array]) -> tuple[Array, Array]:
  scale, bias = (norm[k].reshape(1, 1, 1, -1) for k in ("scale", "bias"))
  return scale, bias


def _map(x: Array) -> Array:
  return x[:, None, None] if x.ndim == 2 else x


def _nearest(x: Array, size: tuple[int, int]) -> Array:
  """Row i is row floor(i · h / h2), as PyTorch's."""
  b, h, w, c = x.shape
  if (h, w) == size:
    return x
  if size[0] % h == 0 and size[1] % w == 0:  # no gather, nor a scatter back
    shape = (b, h, size[0] // h, w, size[1] // w, c)
    wide = jnp.broadcast_to(x[:, :, None, :, None], shape)
    return wide.reshape(b, *size, c)
  # `jax.image.resize` takes the row nearest to a pixel's centre instead.
  rows, columns = (
    np.arange(n) * length // n for n, length in zip(size, x.shape[1:3])
  )
  return x[:, rows][:, :, columns]
