"""What a language model's student begins with: parts of others, adapters."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import errors, importance, inherit, lora
from kdjax.config.values import plain
from kdjax.models.decoder import Architecture
from kdjax.types import Batch, Params


def check_student(student: Any) -> None:
  """Refuses adapters, and embeddings of the teacher, on nothing to put them."""
  if student.lora.rank and not student.path:
    raise errors.UserError(
      f"student.lora.rank is {student.lora.rank} and student.path is empty: "
      "adapters need weights that they adapt; name them, or set rank=0"
    )
  if student.inherit.embeddings and student.path:
    raise errors.UserError(
      "student.inherit.embeddings is set and student.path names weights that "
      "have embeddings: leave one of the two out"
    )


def inherited_sizes(student: Any) -> dict[str, Any]:
  """What `inherit` is to keep of the teacher; {} where nothing is inherited.

  Raises:
    UserError: the student is said to be something else besides.
  """
  names = ("layers", "width", "mlp_width", "kv_heads")
  sizes = {n: student.inherit[n] for n in names if student.inherit[n]}
  other = {"path": student.path, "model": plain(student.model)}
  clash = [f"student.{name}" for name, value in other.items() if value]
  if sizes and (clash or student.inherit.embeddings):
    clash = clash or ["student.inherit.embeddings"]
    raise errors.UserError(
      f"student.inherit says what of the teacher the student is, and "
      f"{clash[0]} says it otherwise: leave one of the two empty"
    )
  return sizes


def inherited(
  config: Any, net: Architecture, teacher: Params, batches: Iterable[Batch]
) -> Params:
  """The student's first weights, which are some of its teacher's, in float32.

  Args:
    net, teacher: the teacher.
    batches: texts of the teacher, for the importance by activations.
  """
  c = config.student
  measure = {
    "weights": lambda: importance.of_weights(net, teacher),
    "activations": lambda: importance.of_activations(net, teacher, batches),
  }
  scores = errors.choose(
    "student.inherit.importance", c.inherit.importance, measure
  )()
  sizes = inherited_sizes(c)
  _, cut = inherit.inherit(net, teacher, importance=scores, **sizes)
  return jax.tree.map(lambda x: x.astype(jnp.float32), cut)


def adapters(config: Any, base: Params, seed: int) -> Params:
  """The student's adapters as they begin, on `base`."""
  c = config.student.lora
  key = jax.random.key(seed)
  return lora.init(key, base, rank=c.rank, targets=tuple(c.targets))


def adapter_scale(config: Any) -> float:
  return config.student.lora.alpha / config.student.lora.rank
