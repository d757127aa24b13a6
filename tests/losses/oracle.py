"""What the equation tests share: inputs, float64 softmax, and the comparison.

Nothing here comes from kdjax. An equation is a function of float64 NumPy arrays
`(student, teacher, *labels, **hparams) -> [*batch]`; its gradient is taken by
central differences.
"""

import decimal
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

RTOL, ATOL = 1e-5, 1e-6  # float32
TEMPERATURES = (0.5, 1.0, 4.0)
NUM_CLASSES = 7

_random = np.random.default_rng(0)


def _logits(*shape):
  # Rounded to float32, so that both sides see the same numbers.
  return np.float64(np.float32(2 * _random.standard_normal(shape)))


STUDENT = _logits(5, NUM_CLASSES)
TEACHER = _logits(5, NUM_CLASSES)
LABELS = np.array([0, 3, 2, 4, 3])


def log_softmax(logits, t=1.0):
  z = logits / t
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softmax(logits, t=1.0):
  return np.exp(log_softmax(logits, t))


def close(got, want, rtol=RTOL, atol=ATOL, what=""):
  np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=what)


def slope(f, x, step=1e-6):
  """df/dx for each element of x, f a scalar, in float64."""
  x = np.asarray(x, np.float64)
  result = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[i] += step
    down[i] -= step
    result[i] = (f(up) - f(down)) / (2 * step)
  return result


@functools.cache
def compiled(loss, **static):
  """Jitted (student, *others, **traced) -> values and two gradients of the sum.

  They are with respect to the student and, 0 where there is none, temperature.
  """

  def total(student, temperature, others, hparams):
    if "temperature" in inspect.signature(loss).parameters:
      hparams = {**hparams, "temperature": temperature}
    values = loss(student, *others, **hparams, **static)
    return jnp.sum(values), values

  gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

  def run(student, *others, temperature=1.0, **hparams):
    (_, values), slopes = gradient(
      _float32(student), temperature, [_float32(x) for x in others], hparams
    )
    return values, *slopes

  return run


def _float32(x):
  # In NumPy: JAX would compile each conversion of a shape.
  x = x if isinstance(x, jax.Array) else np.asarray(x)
  return x.astype(np.float32) if x.dtype == np.float64 else x


def agree(
  loss, equation, *arguments, rtol=RTOL, atol=ATOL, static=None, **hparams
):
  """The loss and its gradients are the equation's, to float32."""
  static = static or {}
  values, d_student, d_temperature = compiled(loss, **static)(
    *arguments, **hparams
  )
  student, *others = arguments
  close(values, equation(*arguments, **static, **hparams), rtol, atol, "value")

  def total(student, **changed):
    return np.sum(
      equation(student, *others, **static, **{**hparams, **changed})
    )

  close(d_student, slope(total, student), rtol, atol, "student's gradient")
  if "temperature" in hparams:
    want = slope(
      lambda t: total(student, temperature=t), hparams["temperature"]
    )
    close(d_temperature, want, rtol, 10 * atol, "temperature's gradient")


def exact(equation, student, teacher):
  """Values and student's gradient in 60 digits, where float64 would cancel.

  `equation` takes the two distributions of one example as lists of `Decimal`.
  """
  with decimal.localcontext(prec=60):
    values, slopes = [], []
    for s, t in zip(student, teacher, strict=True):
      p = _exact_softmax(t)
      values.append(float(equation(p, _exact_softmax(s))))
      step = 1e-9
      row = []
      for i in range(len(s)):
        up = equation(p, _exact_softmax(s, i, step))
        down = equation(p, _exact_softmax(s, i, -step))
        row.append(float((up - down) / decimal.Decimal(2 * step)))
      slopes.append(row)
  return np.array(values), np.array(slopes)


def _exact_softmax(logits, moved=None, by=0.0):
  z = [decimal.Decimal(float(x)) for x in logits]
  if moved is not None:
    z[moved] += decimal.Decimal(by)
  powers = [(x - max(z)).exp() for x in z]
  return [x / sum(powers) for x in powers]
