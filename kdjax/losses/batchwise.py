"""Losses that compare examples of a batch with one another.

Several batch axes count as one. `where` says which examples exist: the others
(padding) move no result, and what is returned for them has no meaning. The mean
of the result over the examples that exist is the batch-wide loss; a part that
belongs to the batch as a whole is repeated for each. Under `jax.jit` the batch
is the global one, whatever the sharding; under `jax.pmap` it is a device's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Shaped

from kdjax.losses.softmax import Softened, soften
from kdjax.losses.traits import logit_loss


@logit_loss(power=2, couples=True)
def dist(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
  inter_weight: ArrayLike = 1.0,
  intra_weight: ArrayLike = 1.0,
  where: Shaped[Array, "*batch"] | None = None,
) -> Float32[Array, "*batch"]:
  """inter_weight · (1 − mean ρ(qᵢ, pᵢ)) + intra_weight · (1 − mean ρ(qʲ, pʲ)).

  ρ is Pearson's correlation: between the classes of one example in the first
  part, between the examples at one class in the second. p and q are the softmax
  of teacher / T and student / T, over the classes where neither logit is -inf.
  It has no unit; each part lies in [0, 2].

  Its gradient tends to a constant as T grows, ρ having no scale. The power 2 it
  declares is the authors' own factor T², kept so that their weights apply.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: T > 0. May be traced.
    inter_weight, intra_weight: β and γ of the paper. May be traced.
    where: true for the examples that exist; all by default.

  Returns:
    Row i has its own first part and the whole second. NaN for an example with
    an empty support.

  Source: Huang et al. 2022, arXiv 2205.10536, section 3. As in the authors'
    code, 1e-8 is added to the product of the norms. A row or column that is
    constant within float32 correlates 0 and sends no gradient; the code sends
    one near 1e8.
  """
  rows, exists = _rows(student, teacher, temperature, where)
  inside = rows.where & exists[:, None]
  inter = 1.0 - _correlation(rows.q, rows.p, inside, axis=1)
  columns = jnp.any(inside, axis=0)
  by_class = jnp.where(columns, _correlation(rows.q, rows.p, inside, axis=0), 0)
  intra = 1.0 - jnp.sum(by_class) / jnp.maximum(jnp.sum(columns), 1)
  loss = _own(inter_weight * inter + intra_weight * intra, rows, exists)
  return loss.reshape(jnp.shape(student)[:-1])


@logit_loss(power=0, couples=True)
def multi_level(
  student: Float[Array, "*batch classes"],
  teacher: Float[Array, "*batch classes"],
  *,
  temperature: ArrayLike = 1.0,
  batch_weight: ArrayLike = 1.0,
  class_weight: ArrayLike = 1.0,
  where: Shaped[Array, "*batch"] | None = None,
) -> Float32[Array, "*batch"]:
  """batch_weight · ‖PPᵀ − QQᵀ‖² / B + class_weight · ‖PᵀP − QᵀQ‖² / C.

  P and Q are the softmaxes of teacher / T and student / T, B examples by C
  classes (those that some example supports); the norm is Frobenius'. The third
  level of the paper, the KL divergence at several T, is a term of its own.

  It holds a B × B and a C × C matrix. No power of T is declared: the authors'
  code has none, although the gradient falls with T.

  Args:
    student: logits that receive the gradient.
    teacher: logits that receive none.
    temperature: T > 0. May be traced.
    batch_weight, class_weight: the weights of the two parts. May be traced.
    where: true for the examples that exist; all by default.

  Returns:
    Row i has Σⱼ (PPᵀ − QQᵀ)²ᵢⱼ, and the whole second part. NaN for an example
    with an empty support.

  Source: Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023, section
    3. The confidence masks of their code act on numbers already averaged, and
    are left out.
  """
  rows, exists = _rows(student, teacher, temperature, where)
  p = jnp.where(exists[:, None], rows.p, 0.0)
  q = jnp.where(exists[:, None], rows.q, 0.0)
  of_batch = jnp.sum((_gram(p) - _gram(q)) ** 2, axis=1)
  num_classes = jnp.sum(jnp.any(rows.where & exists[:, None], axis=0))
  of_classes = jnp.sum((_gram(p.T) - _gram(q.T)) ** 2)
  of_classes /= jnp.maximum(num_classes, 1)
  loss = batch_weight * of_batch + class_weight * of_classes
  return _own(loss, rows, exists).reshape(jnp.shape(student)[:-1])


def _rows(
  student: Array, teacher: Array, temperature: ArrayLike, where: Array | None
) -> tuple[Softened, Array]:
  """The distributions as rows, and which rows exist."""
  batch = jnp.shape(student)[:-1]
  exists = jnp.ones(batch, bool) if where is None else jnp.asarray(where, bool)
  # Zeros before the softmax: a NaN in a row that does not exist would come back
  # in the student's gradient through any `where` that comes after.
  student = jnp.where(exists[..., None], student, 0.0)
  rows = soften(student, teacher, temperature)
  flat = [x.reshape(-1, x.shape[-1]) for x in rows]
  return Softened(*flat), exists.reshape(-1)


def _gram(x: Array) -> Array:
  # GPUs and TPUs multiply in fewer bits by default, and what counts here is the
  # small difference of two products.
  return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)


def _own(loss: ArrayLike, rows: Softened, exists: Array) -> Array:
  empty = exists & ~jnp.any(rows.where, axis=1)
  return jnp.where(empty, jnp.nan, loss)


def _correlation(x: Array, y: Array, where: Array, axis: int) -> Array:
  """Pearson's correlation along an axis, over `where`; 0 if one is constant."""
  x, x_norm = _centred(x, where, axis)
  y, y_norm = _centred(y, where, axis)
  return jnp.sum(x * y, axis=axis) / (x_norm * y_norm + 1e-8)


def _centred(x: Array, where: Array, axis: int) -> tuple[Array, Array]:
  """x less its mean over `where`, and its norm; both 0 if x is constant."""
  count = jnp.maximum(jnp.sum(where, axis=axis, keepdims=True), 1)
  mean = jnp.sum(x, axis=axis, where=where, keepdims=True) / count
  centred = jnp.where(where, x - mean, 0.0)
  squares = jnp.sum(centred**2, axis=axis, keepdims=True)
  # Below this the deviations are the rounding of x, and √ has no slope at 0.
  total = jnp.sum(x**2, axis=axis, where=where, keepdims=True)
  varies = squares > jnp.maximum(1e-12 * total, 1e-30)
  norm = jnp.sqrt(jnp.where(varies, squares, 1.0))
  norm = jnp.where(varies, norm, 0.0)
  return jnp.where(varies, centred, 0.0), jnp.squeeze(norm, axis)
