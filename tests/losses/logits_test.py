import numpy as np
import pytest

from kdjax import losses

from . import oracle
from .oracle import STUDENT, TEACHER, log_softmax, softmax


def logit_mse(student, teacher, *, temperature):
  return np.mean(((student - teacher) / temperature) ** 2, axis=-1)


def ttm(student, teacher, *, temperature, exponent):
  powers = softmax(teacher, temperature) ** exponent
  target = powers / powers.sum(-1, keepdims=True)
  log_q = log_softmax(student, temperature)
  return np.sum(target * (np.log(target) - log_q), axis=-1)


def wttm(student, teacher, *, temperature, exponent):
  weight = np.sum(softmax(teacher, temperature) ** exponent, axis=-1)
  kept = {"temperature": temperature, "exponent": exponent}
  return weight * ttm(student, teacher, **kept)


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
def test_logit_mse_matches_its_equation(temperature):
  oracle.agree(
    losses.logit_mse, logit_mse, STUDENT, TEACHER, temperature=temperature
  )


@pytest.mark.parametrize("temperature", oracle.TEMPERATURES)
@pytest.mark.parametrize("exponent", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("equation", [ttm, wttm])
def test_transformed_teacher_matches_its_equation(
  equation, exponent, temperature
):
  oracle.agree(
    getattr(losses, equation.__name__), equation, STUDENT, TEACHER,
    temperature=temperature, exponent=exponent,
  )  # fmt: skip


def test_ttm_is_a_teacher_at_a_temperature_of_its_own():
  got, _, _ = oracle.compiled(losses.ttm)(STUDENT, TEACHER, exponent=0.25)
  want, _, _ = oracle.compiled(losses.with_teacher_temperature(losses.kl))(
    STUDENT, TEACHER, teacher_temperature=4.0
  )
  oracle.close(got, want)


def test_padding_the_classes_leaves_the_mean_squared_error():
  pad = np.full((5, 3), -np.inf)
  got, gradient, _ = oracle.compiled(losses.logit_mse)(
    np.concatenate([STUDENT, pad], axis=1),
    np.concatenate([TEACHER, pad], axis=1),
  )
  oracle.close(got, logit_mse(STUDENT, TEACHER, temperature=1.0))
  assert np.isfinite(gradient).all()
