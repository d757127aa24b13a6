"""The shapes in the signatures, checked by beartype through jaxtyping."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from . import oracle


@pytest.fixture(scope="module")
def checked():
  """A second copy of `kdjax.losses`, whose functions check their arguments."""
  import kdjax.losses

  # Others hold the first copy's functions, and compare them: it comes back.
  first = {k: m for k, m in sys.modules.items() if k.startswith("kdjax.losses")}
  for name in first:
    del sys.modules[name]
  try:
    with jaxtyping.install_import_hook("kdjax.losses", "beartype.beartype"):
      yield importlib.import_module("kdjax.losses")
  finally:
    sys.modules.update(first)
    kdjax.losses = first["kdjax.losses"]


def arguments(checked, name, dtype=jnp.float32):
  traits = checked.traits(checked.LOGIT_LOSSES[name])
  given = [jnp.asarray(oracle.STUDENT, dtype)]
  if traits.teacher:
    given.append(jnp.asarray(oracle.TEACHER, dtype))
  if traits.labels:
    given.append(jnp.asarray(oracle.LABELS))
  return given


def names():
  from kdjax.losses import LOGIT_LOSSES

  return sorted(LOGIT_LOSSES)


@pytest.mark.parametrize("name", names())
def test_signature_admits_what_the_loss_takes(checked, name):
  loss = checked.LOGIT_LOSSES[name]
  # Tracing is enough: the shapes are checked then.
  assert jax.eval_shape(loss, *arguments(checked, name)).shape == (5,)
  wide = [x[None] for x in arguments(checked, name, jnp.bfloat16)]
  assert jax.eval_shape(loss, *wide).shape == (1, 5)


def test_signature_admits_soft_labels(checked):
  logits = jnp.float32(oracle.STUDENT)
  assert jax.eval_shape(checked.cross_entropy, logits, logits).shape == (5,)


@pytest.mark.parametrize("number", [2, 2.0, jnp.float32(2.0)])
@pytest.mark.parametrize(
  ("name", "argument"),
  [("kl", "temperature"), ("alpha_beta", "a"), ("ttm", "exponent")],
)
def test_signature_admits_numbers_and_scalar_arrays(
  checked, name, argument, number
):
  loss = functools.partial(checked.LOGIT_LOSSES[name], **{argument: number})
  assert jax.eval_shape(loss, *arguments(checked, name)).shape == (5,)


@pytest.mark.parametrize("name", names())
def test_signature_refuses_integers_for_logits(checked, name):
  student, *others = arguments(checked, name)
  with pytest.raises(jaxtyping.TypeCheckError):
    jax.eval_shape(checked.LOGIT_LOSSES[name], student.astype(int), *others)


@pytest.mark.parametrize("name", names())
def test_signature_refuses_arguments_of_different_batches(checked, name):
  *others, last = arguments(checked, name)
  with pytest.raises(jaxtyping.TypeCheckError):
    checked.LOGIT_LOSSES[name](*others, last[:4])


def test_transforms_work_on_checked_losses(checked):
  loss = checked.zscore(checked.with_teacher_temperature(checked.kl))
  given = arguments(checked, "kl")
  values = jax.eval_shape(lambda *x: loss(*x, teacher_temperature=2.0), *given)
  assert values.shape == (5,)
