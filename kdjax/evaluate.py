"""Quality on held-out data, as sums divided once.

accuracy    share of examples whose most likely class is the label
nll         negative log-likelihood of the label, nats per example
ece         expected calibration error: Σ over 15 equal bins of confidence
            of (bin's share) · |accuracy − mean confidence| (Guo et al.
            2017, section 3)
agreement   share of examples on which student and teacher name one class
kl          KL(teacher ‖ student) at T = 1, nats per example

Of texts, whose examples are tokens, besides:

perplexity     exp(nll)
bits_per_byte  Σ nll / (log 2 · bytes of the text), which networks of different
               tokenizers can be compared by
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from kdjax import errors, losses, parallel, pins
from kdjax.losses import fused
from kdjax.types import Batch, LinearLogits, Model, Variables, dense

NUM_BINS = 15


def sums(
  student: Array, label: Array, mask: Array, teacher: Array | None = None
) -> dict[str, Array]:
  """What `finish` divides; add it up over batches.

  Args:
    student, teacher: logits `[B, classes]`.
    label: `[B]` class numbers.
    mask: `[B]`; an example with 0 changes nothing.
  """
  counts = mask > 0
  student = jnp.where(counts[:, None], student.astype(jnp.float32), 0.0)
  label = jnp.where(counts, label, 0)
  weight = mask.astype(jnp.float32)
  guess = jnp.argmax(student, -1)
  right = weight * (guess == label)
  confidence = jnp.max(jax.nn.softmax(student), -1)
  # Bins (0, 1/15], (1/15, 2/15] ...: a confidence of 1 is in the last.
  bins = jnp.int32(jnp.ceil(confidence * NUM_BINS)) - 1
  in_bin = jax.nn.one_hot(bins, NUM_BINS) * weight[:, None]
  result = {
    "weight": weight.sum(),
    "accuracy": right.sum(),
    "nll": jnp.sum(weight * losses.cross_entropy(student, label)),
    # Only the difference of the two sums of a bin is ever needed.
    "ece": in_bin.T @ ((guess == label) - confidence),
  }
  if teacher is not None:
    teacher = jnp.where(counts[:, None], teacher.astype(jnp.float32), 0.0)
    result["agreement"] = jnp.sum(weight * (guess == jnp.argmax(teacher, -1)))
    result["kl"] = jnp.sum(weight * losses.kl(student, teacher))
  return result


def output_sums(
  student: Array | LinearLogits,
  label: Array,
  mask: Array,
  teacher: Array | LinearLogits | None = None,
  layout: fused.Layout | None = None,
) -> dict[str, Array]:
  """`sums` of `[*batch, classes]`, a chunk at a time of `LinearLogits`."""
  if isinstance(student, LinearLogits):
    rows = {"label": label, "mask": mask}
    chunked = lambda student, teacher, rows, _: (  # noqa: E731
      {},
      sums(student, rows["label"], rows["mask"], teacher),
    )
    return fused.sum_rows(
      chunked, jax.lax.stop_gradient(student), teacher, rows, (), layout
    )[1]
  flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
  theirs = None if teacher is None else flat(dense(teacher))
  return sums(flat(student), label.reshape(-1), mask.reshape(-1), theirs)


def finish(total: dict[str, Any]) -> dict[str, float]:
  """Sums over all batches -> the metrics of this module's docstring."""
  weight = float(total["weight"])
  if weight == 0:
    raise errors.UserError("nothing to evaluate: every example is masked")
  found = {
    name: float(np.abs(np.asarray(value)).sum() if name == "ece" else value)
    / weight
    for name, value in total.items()
    if name not in ("weight", "bytes")
  }
  if "bytes" in total:
    found["perplexity"] = math.exp(min(found["nll"], 700.0))
    per_byte = float(total["nll"]) / float(total["bytes"])
    found["bits_per_byte"] = per_byte / math.log(2)
  return found


def make_evaluate(
  student: Model,
  teacher: Model | None = None,
  mesh: Mesh | None = None,
  layout: fused.Layout | None = None,
) -> Callable[[Variables, Any, Iterable[Batch]], dict[str, float]]:
  """`evaluate(variables, frozen, batches) -> {metric: value}`, compiled once.

  `variables` and `frozen` are the `(params, stats)` of student and teacher;
  `batches` need `mask` and `label`, those of texts `num_bytes` too. Without a
  teacher `frozen` is ignored. `layout` is that of `make_train_step`.
  """
  mesh = mesh or parallel.make_mesh()

  @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
  def batch_sums(variables: Variables, frozen: Any, batch: Batch):
    with pins.inside(mesh):
      logits = student.apply(*variables, batch, train=False)[0].logits
      target = None
      if teacher is not None:
        params, stats = frozen
        target = teacher.apply(params, stats, batch, train=False)[0].logits
      mask = batch["mask"]
      total = output_sums(logits, batch["label"], mask, target, layout)
    if "num_bytes" in batch:
      total["bytes"] = jnp.sum(mask * batch["num_bytes"])
    return total

  def evaluate(variables, frozen, batches):
    total = None
    for batch in batches:
      part = batch_sums(variables, frozen, parallel.put_batch(batch, mesh))
      total = part if total is None else jax.tree.map(jnp.add, total, part)
    if total is None:
      raise errors.UserError("nothing to evaluate: there are no batches")
    return finish(jax.device_get(total))

  return evaluate


def num_parameters(params: PyTree) -> int:
  return sum(int(np.prod(jnp.shape(x))) for x in jax.tree.leaves(params))


def flops_per_example(
  model: Model, variables: Variables, batch: Batch
) -> float:
  """Floating-point operations of one example's forward pass, by XLA's count.

  A multiplication and an addition are two. The body of a loop is counted once,
  whatever its trip count: a scanned network needs its unrolled twin here.
  """
  one = {
    k: jax.ShapeDtypeStruct((1, *np.shape(v)[1:]), np.asarray(v).dtype)
    for k, v in batch.items()
  }

  def forward(variables: Variables, batch: Batch):
    return dense(model.apply(*variables, batch, train=False)[0].logits)

  shapes = jax.eval_shape(lambda: variables)
  cost = jax.jit(forward).lower(shapes, one).cost_analysis()
  return float((cost or {}).get("flops", np.nan))
