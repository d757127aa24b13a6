"""CRD with its memory banks, and InfoNCE without: each with two embeddings.

Both embeddings are trained with the student: the teacher's activation receives
no gradient, its embedding does.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from kdjax.errors import UserError
from kdjax.losses import contrastive
from kdjax.losses.maps import l2_normalize
from kdjax.objective import Names, Term
from kdjax.types import Batch, ScalarOrSchedule

# Rows of a bank, so that any usual number of devices divides them.
_ROWS = 128


def crd(
  name: str,
  taps: tuple[Names, Names],
  *,
  weight: ScalarOrSchedule,
  num_examples: int,
  embedding: int = 128,
  num_negatives: int = 16384,
  temperature: ScalarOrSchedule = 0.07,
  momentum: float = 0.5,
) -> Term:
  """Contrastive representation distillation, with memory banks (CRD).

      NCE(s · t₀ / T, s · tₖ / T) + NCE(t · s₀ / T, t · sₖ / T)

  s and t are the embeddings of one example, scaled to length 1; tₖ and sₖ come
  from two banks that hold one row for each of the N examples: k = 0 is the
  example's own row, the others are drawn from the other N − 1, uniformly and
  with replacement. NCE is `losses.contrastive.noise_contrastive` of
  log p = score − log Z, and Z a constant that the first batch sets. After the
  loss, the example's own rows move towards s and t.

  It holds two banks of N × `embedding` floats, split over the devices, and
  B × N products for each.

  Args:
    name: of the term.
    taps: the student's and the teacher's activation, flattened; the authors
      take the pooled features.
    weight: 0.8 in the authors' recipe.
    num_examples: N, the size of the training set (`check_bank`).
    embedding: the width of the two linear maps.
    num_negatives: K. It may exceed N.
    temperature: T > 0, a number or a schedule.
    momentum: the share of the old row, in [0, 1).

  Returns:
    A term whose batches need `index`; an index outside 0..N − 1 gives NaN. Rows
    with mask 0 move neither loss, Z nor banks; of several with one index, the
    last one is kept.

  Raises:
    UserError: for a size or share that is out of range.

  Source: Tian et al. 2020, arXiv 1910.10699, section 3.1, and their code; but
    there the K others are of other classes, drawn without replacement, which
    needs the labels of the whole set.
  """
  for what, value, least in (
    ("num_examples", num_examples, 2),
    ("embedding", embedding, 1),
    ("num_negatives", num_negatives, 1),
  ):
    if value < least:
      raise UserError(
        f"term {name!r} got {what}={value}, needs {least} or more: give its "
        "number"
      )
  if not 0 <= momentum < 1:
    raise UserError(
      f"term {name!r} got momentum={momentum}, must be in [0, 1): choose 0.5"
    )
  return Term(
    name,
    functools.partial(
      _crd,
      name=name,
      num_examples=num_examples,
      num_negatives=num_negatives,
      momentum=momentum,
    ),
    weight,
    hparams={"temperature": temperature},
    taps=taps,
    init=functools.partial(_init_crd, num_examples, embedding),
    couples=True,
    sharded=("student_bank", "teacher_bank"),
  )


def info_nce(
  name: str,
  taps: tuple[Names, Names],
  *,
  weight: ScalarOrSchedule,
  embedding: int = 128,
  temperature: ScalarOrSchedule = 0.07,
) -> Term:
  """`losses.info_nce` of two linear embeddings: CRD's idea without a bank.

  Args:
    name: of the term.
    taps: the student's and the teacher's activation, flattened.
    weight: of the term.
    embedding: the width of the two linear maps.
    temperature: T > 0, a number or a schedule.
  """
  if embedding < 1:
    raise UserError(
      f"term {name!r} got embedding={embedding}, needs 1 or more: give a width"
    )
  return Term(
    name,
    _info_nce,
    weight,
    hparams={"temperature": temperature},
    taps=taps,
    init=lambda *given: (_init_embeddings(embedding, *given), {}),
    couples=True,
  )


def check_bank(num_examples: int, source_size: int) -> None:
  """Refuses a bank without a row for each example of the data set.

  Raises:
    UserError: if `num_examples` < `source_size`.
  """
  if num_examples < source_size:
    raise UserError(
      f"memory bank of {num_examples} rows is smaller than the dataset's "
      f"{source_size} examples: set num_examples={source_size}"
    )


def _crd(
  params: PyTree,
  state: PyTree,
  student: Array,
  teacher: Array,
  batch: Batch,
  key: Array,
  *,
  temperature: float | Array,
  name: str,
  num_examples: int,
  num_negatives: int,
  momentum: float,
) -> tuple[Array, PyTree]:
  if "index" not in batch:
    raise UserError(
      f"term {name!r} keeps a row for each example and the batch has "
      f"{', '.join(sorted(batch))}: give batch['index'], the examples' numbers"
    )
  exists = jnp.asarray(batch["mask"]) > 0
  index = jnp.asarray(batch["index"])
  within = (index >= 0) & (index < num_examples)
  index, known = jnp.where(within, index, 0), exists & within
  s, t = _embeddings(params, student, teacher, exists)
  s, t = l2_normalize(s), l2_normalize(t)

  chosen = _candidates(key, index, num_negatives, num_examples)
  contrast = functools.partial(
    contrastive.bank_contrastive,
    chosen=chosen,
    exists=known,
    is_set=state["has_log_z"],
    num_examples=num_examples,
  )
  of_s, z_of_s, after_s = contrast(
    s / temperature, state["teacher_bank"], log_z=state["log_z"][0]
  )
  of_t, z_of_t, after_t = contrast(
    t / temperature, state["student_bank"], log_z=state["log_z"][1]
  )
  move = functools.partial(
    contrastive.remembered, index=index, exists=known, momentum=momentum
  )
  return jnp.where(within, of_s + of_t, jnp.nan), {
    "student_bank": move(state["student_bank"], rows=s + after_t),
    "teacher_bank": move(state["teacher_bank"], rows=t + after_s),
    "log_z": jnp.stack([z_of_s, z_of_t]),
    "has_log_z": state["has_log_z"] | jnp.any(known),
  }


def _init_crd(
  num_examples: int, embedding: int, key: Array, student: Array, teacher: Array
) -> tuple[PyTree, PyTree]:
  """Embeddings, and banks of rows whose length is about 1."""
  own, *keys = jax.random.split(key, 3)
  shape = (-(-num_examples // _ROWS) * _ROWS, embedding)
  limit = math.sqrt(3 / embedding)
  ours, theirs = (
    jax.random.uniform(k, shape, minval=-limit, maxval=limit) for k in keys
  )
  return _init_embeddings(embedding, own, student, teacher), {
    "student_bank": ours,
    "teacher_bank": theirs,
    "log_z": jnp.zeros(2),
    "has_log_z": jnp.zeros((), bool),
  }


def _candidates(
  key: Array, index: Array, num_negatives: int, num_examples: int
) -> Array:
  """[B, 1 + K]: the example itself, and others."""
  # `randint` draws twice as many bits, to be even beyond one part in 2³² / N.
  drawn = jax.random.bits(key, (len(index), num_negatives), jnp.uint32)
  others = (drawn % (num_examples - 1)).astype(index.dtype)
  others += others >= index[:, None]  # steps over the example itself
  return jnp.concatenate([index[:, None], others], axis=1)


def _info_nce(
  params: PyTree,
  state: PyTree,
  student: Array,
  teacher: Array,
  batch: Batch,
  key: Array,
  *,
  temperature: float | Array,
) -> tuple[Array, PyTree]:
  del key
  exists = jnp.asarray(batch["mask"]) > 0
  s, t = _embeddings(params, student, teacher, exists)
  return contrastive.two_sided(temperature, s, t, exists), state


def _embeddings(
  params: PyTree, student: Array, teacher: Array, exists: Array
) -> tuple[Array, Array]:
  """Both sides' x W + b; the teacher's x without gradient."""

  def embed(layer: dict[str, Array], x: Array) -> Array:
    x = jnp.asarray(x, jnp.float32).reshape(len(exists), -1)
    x = jnp.where(exists[:, None], x, 0.0)
    return x @ layer["kernel"] + layer["bias"][None, :]

  teacher = jax.lax.stop_gradient(teacher)
  return embed(params["student"], student), embed(params["teacher"], teacher)


def _init_embeddings(
  embedding: int, key: Array, student: Array, teacher: Array
) -> dict[str, dict[str, Array]]:
  """Uniform within ±1 / √inputs, as the authors' layers begin."""

  def layer(key: Array, spec: Array) -> dict[str, Array]:
    inputs = math.prod(spec.shape[1:])
    draw = functools.partial(
      jax.random.uniform, minval=-(inputs**-0.5), maxval=inputs**-0.5
    )
    kernel_key, bias_key = jax.random.split(key)
    return {
      "kernel": draw(kernel_key, (inputs, embedding)),
      "bias": draw(bias_key, (embedding,)),
    }

  ours, theirs = jax.random.split(key)
  return {"student": layer(ours, student), "teacher": layer(theirs, teacher)}
