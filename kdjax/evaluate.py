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


def facts(
  student: Array, label: Array, mask: Array, teacher: Array | None = None
) -> dict[str, Array]:
  """What there is to say of each example, `[B]`; 0 where it does not count.

  Args:
    student, teacher: logits `[B, classes]`.
    label: `[B]` class numbers.
    mask: `[B]`; 0 = does not count.

  Returns:
    `guess`, the most likely class, `confidence`, its probability, and `nll`;
    with a teacher `teacher_guess` and `kl` too.
  """
  counts = mask > 0
  student = jnp.where(counts[:, None], student.astype(jnp.float32), 0.0)
  label = jnp.where(counts, label, 0)
  found = {
    "guess": jnp.argmax(student, -1),
    "confidence": jnp.max(jax.nn.softmax(student), -1),
    "nll": losses.cross_entropy(student, label),
  }
  if teacher is not None:
    teacher = jnp.where(counts[:, None], teacher.astype(jnp.float32), 0.0)
    found["teacher_guess"] = jnp.argmax(teacher, -1)
    found["kl"] = losses.kl(student, teacher)
  return {name: jnp.where(counts, x, 0) for name, x in found.items()}


def sums(
  student: Array, label: Array, mask: Array, teacher: Array | None = None
) -> dict[str, Array]:
  """What `finish` divides; add it up over batches. Arguments as of `facts`."""
  return _add_up(facts(student, label, mask, teacher), label, mask)


def _add_up(
  found: dict[str, Array], label: Array, mask: Array
) -> dict[str, Array]:
  weight = mask.astype(jnp.float32)
  right = found["guess"] == label
  confidence = found["confidence"]
  # Bins (0, 1/15], (1/15, 2/15] ...: a confidence of 1 is in the last.
  bins = jnp.int32(jnp.ceil(confidence * NUM_BINS)) - 1
  in_bin = jax.nn.one_hot(bins, NUM_BINS) * weight[:, None]
  result = {
    "weight": weight.sum(),
    "accuracy": jnp.sum(weight * right),
    "nll": jnp.sum(weight * found["nll"]),
    # Only the difference of the two sums of a bin is ever needed.
    "ece": in_bin.T @ (right - confidence),
  }
  if "kl" in found:
    same = found["guess"] == found["teacher_guess"]
    result["agreement"] = jnp.sum(weight * same)
    result["kl"] = jnp.sum(weight * found["kl"])
  return result


def output_sums(
  student: Array | LinearLogits,
  label: Array,
  mask: Array,
  teacher: Array | LinearLogits | None = None,
  layout: fused.Layout | None = None,
  *,
  each: bool = False,
) -> tuple[dict[str, Array], dict[str, Array]]:
  """`sums` of `[*batch, classes]`, a chunk at a time of `LinearLogits`.

  Args:
    student, label, mask, teacher: as for `facts`.
    layout: as for `make_train_step`.
    each: whether the examples' own facts are asked for.

  Returns:
    The sums, and `facts` `[*batch]`, {} unless asked for.
  """
  if isinstance(student, LinearLogits):
    places = jnp.arange(mask.size).reshape(mask.shape)
    rows = {"label": label, "mask": mask, "place": places}

    def chunked(student, teacher, rows, _):
      found = facts(student, rows["label"], rows["mask"], teacher)
      totals = _add_up(found, rows["label"], rows["mask"])
      # Sums are all that comes out of the loop: each row adds to its place.
      put = lambda x: jnp.zeros(mask.size, x.dtype).at[rows["place"]].add(x)  # noqa: E731
      return {}, (totals, jax.tree.map(put, found) if each else {})

    student = jax.lax.stop_gradient(student)
    totals, found = fused.sum_rows(chunked, student, teacher, rows, (), layout)[
      1
    ]
  else:
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    theirs = None if teacher is None else flat(dense(teacher))
    label, weight = label.reshape(-1), mask.reshape(-1)
    found = facts(flat(student), label, weight, theirs)
    totals = _add_up(found, label, weight)
  shaped = {name: x.reshape(mask.shape) for name, x in found.items()}
  return totals, shaped if each else {}


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
  examine = make_examine(student, teacher, mesh, layout)
  return lambda *given: examine(*given)[0]


def make_examine(
  student: Model,
  teacher: Model | None = None,
  mesh: Mesh | None = None,
  layout: fused.Layout | None = None,
  *,
  most: int = 0,
) -> Callable[..., tuple[dict[str, float], dict[str, np.ndarray]]]:
  """`examine(variables, frozen, batches) -> ({metric: value}, facts)`.

  In one pass what `make_evaluate` says of all examples and, of the first `most`
  that count, what `facts` says of each, `[n]`: besides its `label` and the
  `row` of the batches, counted from the first, that it is or stands in. Every
  process gets them all.
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
      label, mask = batch["label"], batch["mask"]
      total, found = output_sums(
        logits, label, mask, target, layout, each=most > 0
      )
    if "num_bytes" in batch:
      total["bytes"] = jnp.sum(mask * batch["num_bytes"])
    if found:
      found |= {"label": label, "mask": mask}
    return total, found

  def examine(variables, frozen, batches):
    total, kept, row, room = None, [], 0, most
    for batch in batches:
      part, found = batch_sums(
        variables, frozen, parallel.put_batch(batch, mesh)
      )
      total = part if total is None else jax.tree.map(jnp.add, total, part)
      if room > 0:
        kept.append(_counted(jax.device_get(found), row, room))
        row += len(found["mask"])
        room -= len(kept[-1]["row"])
    if total is None:
      raise errors.UserError("nothing to evaluate: there are no batches")
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *kept or [{}])
    return finish(jax.device_get(total)), joined

  return examine


def _counted(
  found: dict[str, np.ndarray], row: int, room: int
) -> dict[str, np.ndarray]:
  """Those facts that count, `room` at most, and the rows that they are of."""
  at = np.nonzero(found["mask"] > 0)
  at = tuple(axis[:room] for axis in at)
  kept = {name: x[at] for name, x in found.items() if name != "mask"}
  return {**kept, "row": (row + at[0]).astype(np.int32)}


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
