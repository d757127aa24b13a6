"""Learned maps from a student's activation to the shape of a teacher's.

    term = Term("hint", losses.hint, taps=("stage_2", "stage_2"))
    term = project(term, linear(norm=True))

A projector is trained with the student and saved with it, and is no part of the
student: `project` makes it a variable of the term. Of two maps the larger one
is averaged down to the other (a 1x1 convolution and that average commute).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax import convolution, errors
from kdjax.losses import maps
from kdjax.objective import Term
from kdjax.types import Batch

Spec = Any  # jax.ShapeDtypeStruct, or an array
HIGHEST = jax.lax.Precision.HIGHEST


class Projector(NamedTuple):
  """A learned map as two pure functions.

  Attributes:
    init: `(key, source, target) -> params`, from the shapes of the activation
      and of what it shall fit.
    apply: `(params, x, like, where) -> y` of `like`'s shape, whose values do
      not count. `where` [B] says which examples exist.
    couples: whether examples meet in it, as in batch normalisation.
  """

  init: Callable[[Array, Spec, Spec], PyTree]
  apply: Callable[[PyTree, Array, Spec, Array], Array]
  couples: bool = False


def linear(*, norm: bool = False, bias: bool = True) -> Projector:
  """x W + b over channels; on maps that is a 1x1 convolution.

  Args:
    norm: then batch normalisation, by the batch's own statistics: a projector
      only ever trains. There is no bias before it, where it would do nothing.
    bias: whether there is b.
  """
  return mlp(num_hidden=0, norm=norm, bias=bias)


def mlp(
  *,
  num_hidden: int = 1,
  hidden: int = 0,
  norm: bool = False,
  bias: bool = True,
) -> Projector:
  """Linear layers over channels with ReLU between, each normalised if `norm`.

  Args:
    num_hidden: hidden layers; two with the target's width are VID's regressor
      (Ahn et al. 2019, section 3).
    hidden: their width; 0 = that of the target.
    norm, bias: as for `linear`.
  """
  if num_hidden < 0 or hidden < 0:
    raise errors.UserError(
      f"got num_hidden={num_hidden}, hidden={hidden}: give numbers >= 0"
    )

  def init(key: Array, source: Spec, target: Spec) -> PyTree:
    _check(source, target)
    widths = [source.shape[-1]]
    widths += [hidden or target.shape[-1]] * num_hidden
    widths += [target.shape[-1]]
    keys = jax.random.split(key, len(widths) - 1)
    return {
      f"layer_{n}": _layer(k, (a, b), norm=norm, bias=bias)
      for n, (k, a, b) in enumerate(zip(keys, widths, widths[1:]))
    }

  def apply(params: PyTree, x: Array, like: Spec, where: Array) -> Array:
    x = _resize(jnp.asarray(x, jnp.float32), like)
    for n in range(len(params)):
      layer = params[f"layer_{n}"]
      x = x if n == 0 else jax.nn.relu(x)
      kernel = layer["kernel"]
      if norm:
        x, kernel = normalizing(x, kernel, where)
        kernel = kernel * layer["scale"][None, :]
      x = _plus_bias(x @ kernel, layer)
    return x

  return Projector(init, apply, couples=norm)


def conv(*, size: int = 3, norm: bool = True, relu: bool = True) -> Projector:
  """A convolution over maps: FitNets' regressor (Romero et al. 2015, 2.2).

  Args:
    size: of the kernel, odd; the map keeps its size, then is averaged down.
    norm: then batch normalisation, as the code of the CIFAR papers has it.
    relu: then ReLU, likewise; for teacher taps that are not negative.
  """
  if size < 1 or size % 2 == 0:
    raise errors.UserError(f"conv got size={size}, needs an odd number >= 1")

  def init(key: Array, source: Spec, target: Spec) -> PyTree:
    _check(source, target)
    maps.spatial_size(source)
    channels = (source.shape[-1], target.shape[-1])
    return _layer(key, (size, size, *channels), norm=norm, bias=True)

  def apply(params: PyTree, x: Array, like: Spec, where: Array) -> Array:
    x = _resize(convolve(jnp.asarray(x, jnp.float32), params["kernel"]), like)
    if norm:
      x = batch_norm(x, where) * params["scale"].reshape(1, 1, 1, -1)
    x = _plus_bias(x, params)
    return jax.nn.relu(x) if relu else x

  return Projector(init, apply, couples=norm)


# By the name that a config gives.
PROJECTORS = {"linear": linear, "mlp": mlp, "conv": conv}


def project(term: Term, projector: Projector) -> Term:
  """The term with its loss on the projected student's activation.

  Several student taps get a projector each. A teacher's map that is larger than
  the student's is averaged down to it. The term's own variables, if it has any,
  keep their place beside the projector's.

  Raises:
    UserError: if the term reads no taps, has a temperature, needs labels or
      takes whole sequences.
  """
  _check_term(term)
  assert term.taps is not None
  one, inner_init = isinstance(term.taps[0], str), term.init

  def several(x: Any) -> tuple[Any, ...]:
    return (x,) if one else tuple(x)

  def as_given(x: tuple[Any, ...]) -> Any:
    return x[0] if one else x

  def targets(student: Any, teacher: Any) -> tuple[Any, ...]:
    pairs = zip(several(student), several(teacher))
    return tuple(_not_larger(theirs, ours) for ours, theirs in pairs)

  def init(key: Array, student: Any, teacher: Any) -> tuple[PyTree, PyTree]:
    likes = jax.eval_shape(targets, student, teacher)
    own_key, *keys = jax.random.split(key, 1 + len(likes))
    drawn = map(projector.init, keys, several(student), likes)
    params = {"projector": {str(n): layers for n, layers in enumerate(drawn)}}
    if inner_init is None:
      return params, {}
    like = as_given(likes)
    params["term"], state = inner_init(own_key, like, like)
    return params, state

  def loss(
    params: PyTree,
    state: PyTree,
    student: Any,
    teacher: Any,
    batch: Batch,
    key: Array,
    **hparams: Any,
  ) -> tuple[Array, PyTree]:
    where = jnp.asarray(batch["mask"]) > 0
    likes = targets(student, teacher)
    mapped = tuple(
      projector.apply(params["projector"][str(n)], x, like, where)
      for n, (x, like) in enumerate(zip(several(student), likes))
    )
    both = as_given(mapped), as_given(likes)
    if inner_init is not None:
      return term.loss(params["term"], state, *both, batch, key, **hparams)
    if term.traits.couples:
      hparams["where"] = where
    return term.loss(*both, **hparams), state

  couples = term.coupled or projector.couples
  return dataclasses.replace(term, loss=loss, init=init, couples=couples)


def _check_term(term: Term) -> None:
  """Refuses a term that has no two activations, of examples, to compare."""
  told = f"term {term.name!r} has a projector and"
  if term.taps is None:
    raise errors.UserError(f"{told} no taps: name the activations")
  if term.temperature is not None:
    raise errors.UserError(
      f"{told} a temperature: project activations, not logits"
    )
  if term.traits.labels or not term.traits.teacher:
    raise errors.UserError(
      f"{told} a loss of labels: choose a loss of two activations"
    )
  if term.traits.takes != "examples":
    raise errors.UserError(
      f"{told} a loss of whole sequences, which needs none: leave it out"
    )


def convolve(x: Array, kernel: Array) -> Array:
  """`x` [B, H, W, C] by an odd kernel, of the same size."""
  around = [(size // 2, size // 2) for size in kernel.shape[:2]]
  return convolution.conv_general_dilated(
    x, kernel, (1, 1), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def batch_norm(x: Array, where: Array, epsilon: float = 1e-5) -> Array:
  """(x − mean) / √(variance + epsilon) by channel, over examples that exist."""
  centred, count = _centred(x, where)
  axes = tuple(range(x.ndim - 1))
  variance = jnp.sum(centred**2, axes, keepdims=True) / count
  return centred * jax.lax.rsqrt(variance + epsilon)


def normalizing(
  x: Array, kernel: Array, where: Array, epsilon: float = 1e-5
) -> tuple[Array, Array]:
  """x − mean, and W / √(variance + epsilon), whose product is norm(x W).

  The variances are wᵀ Cov(x) w for the columns w of W. So no sums run over x W,
  which mostly has more channels than x: on a CPU they cost more than x W.
  """
  centred, count = _centred(x, where)
  flat = centred.reshape(-1, x.shape[-1])
  covariance = _gram(flat) / count
  spread = jnp.matmul(covariance, kernel, precision=HIGHEST)
  # Rounding can leave a little below 0.
  variance = jnp.maximum(jnp.sum(kernel * spread, axis=0), 0.0)
  return centred, kernel * jax.lax.rsqrt(variance + epsilon)[None, :]


@jax.custom_vjp
def _gram(x: Array) -> Array:
  """xᵀ x, whose gradient is one product of x's size and not two."""
  return jnp.matmul(x.T, x, precision=HIGHEST)


def _gram_backward(x: Array, slope: Array) -> tuple[Array]:
  return (jnp.matmul(x, slope + slope.T, precision=HIGHEST),)


_gram.defvjp(lambda x: (_gram(x), x), _gram_backward)


def _centred(x: Array, where: Array) -> tuple[Array, Array]:
  """x − mean by channel, 0 where no example is; the number of positions."""
  axes = tuple(range(x.ndim - 1))
  exists = where.reshape(-1, *[1] * (x.ndim - 1))
  positions = x.size // (x.shape[0] * x.shape[-1])
  count = jnp.maximum(jnp.sum(where), 1) * positions
  mean = jnp.sum(jnp.where(exists, x, 0), axes, keepdims=True) / count
  return jnp.where(exists, x - mean, 0), count


def _layer(
  key: Array, shape: tuple[int, ...], *, norm: bool, bias: bool
) -> dict[str, Array]:
  """He's normal kernel; then scale and bias, or a bias alone."""
  make = jax.nn.initializers.he_normal()
  layer = {"kernel": make(key, shape, jnp.float32)}
  if norm:
    layer["scale"] = jnp.ones(shape[-1])
  if norm or bias:
    layer["bias"] = jnp.zeros(shape[-1])
  return layer


def _plus_bias(x: Array, layer: dict[str, Array]) -> Array:
  if "bias" not in layer:
    return x
  return x + layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def _resize(x: Array, like: Spec) -> Array:
  return maps.adaptive_pool(x, maps.spatial_size(like)) if x.ndim == 4 else x


def _not_larger(x: Array, than: Spec) -> Array:
  if x.ndim != 4 or than.ndim != 4:
    return x
  return maps.adaptive_pool(x, maps.smaller_size(x, than))


def _check(source: Spec, target: Spec) -> None:
  """Refuses what no map over channels and no averaging brings together."""
  ours, theirs = source.shape, target.shape
  fits = len(ours) == len(theirs)
  if len(ours) == 4 and fits:
    fits = ours[1] >= theirs[1] and ours[2] >= theirs[2]
  elif fits:
    fits = ours[1:-1] == theirs[1:-1]
  if not fits:
    raise errors.UserError(
      f"no projector brings an activation {_shown(ours)} to {_shown(theirs)}: "
      "both must be maps, the student's at least as large as the teacher's, or "
      "tokens of one number, or vectors; choose other taps"
    )


def _shown(shape: tuple[int, ...]) -> str:
  return f"[{', '.join(['B', *map(str, shape[1:])])}]"
