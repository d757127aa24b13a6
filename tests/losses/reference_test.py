"""Agreement with other libraries' own code, on values computed by running it.

A check, not a definition: the equation tests come first. Each case says how its
source reduces and whether it multiplies by T²; kdjax's losses do neither, so
both are done here.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses

from . import oracle

_PATH = pathlib.Path(__file__).parents[1] / "data" / "losses.json"
_DATA = json.loads(_PATH.read_text())
CASES = {case["name"]: case for case in _DATA["cases"]}
DISTILLM = "distillm2.distillm_v1_{}_kl_a0.1"

# {case: (loss, its arguments, what the source multiplies by)}; mean over rows.
IMAGES = {
  "mdistiller.kd_T4": (losses.kl, {"temperature": 4.0}, 16),
  "mdistiller.dkd_a1_b8_T4": (losses.dkd, {"temperature": 4.0}, 16),
  "lskd.kd_zscore_T2": (losses.zscore(losses.kl), {"temperature": 2.0}, 4),
  "mlkd.bc_T4": (
    losses.multi_level, {"temperature": 4.0, "class_weight": 0.0}, 1
  ),
  "mlkd.cc_T4": (
    losses.multi_level, {"temperature": 4.0, "batch_weight": 0.0}, 1
  ),
  "torchdistill.dist_b1_g1_tau1": (losses.dist, {}, 1),
  "torchdistill.dist_b2_g2_tau1": (
    losses.dist, {"inter_weight": 2.0, "intra_weight": 2.0}, 1
  ),
  "nkd_T1_g1.5": (losses.nkd, {"gamma": 1.5}, 1),
  "ttm_l0.1": (losses.ttm, {"exponent": 0.1}, 1),
  "wttm_l0.1": (losses.wttm, {"exponent": 0.1}, 1),
}  # fmt: skip

# The ends, where the source's JSD jumps to a KL, are kdjax's `scale="unit"`.
UNIT = {"scale": "unit"}
TEXT = {
  "trl.gjsd_beta0_T1_masked_batchmean": (losses.jsd, UNIT, {"mix": 0.0}),
  "trl.gjsd_beta0.5_T2_masked_batchmean": (
    losses.jsd, {}, {"mix": 0.5, "temperature": 2.0}
  ),
  "trl.gjsd_beta1_T1_masked_batchmean": (losses.jsd, UNIT, {"mix": 1.0}),
}  # fmt: skip


def inputs(case, *names):
  return [np.array(_DATA["inputs"][case["inputs"]][n]) for n in names]


@pytest.mark.parametrize("name", IMAGES)
def test_image_losses_agree(name):
  case = CASES[name]
  loss, hparams, factor = IMAGES[name]
  names = ["student_logits", "teacher_logits"]
  if losses.traits(loss).labels:
    names.append("labels")
  values, gradient, _ = oracle.compiled(loss)(*inputs(case, *names), **hparams)
  oracle.close(factor * values.mean(), case["expected"])
  if "expected_per_example" in case:
    oracle.close(factor * values, case["expected_per_example"])
  want = np.array(case["expected_grad"]["student_logits"])
  oracle.close(factor * gradient / len(want), want)


def test_learnt_temperature_agrees():
  case = CASES["ctkd.global_T_lambda-1"]
  student, teacher = inputs(case, "student_logits", "teacher_logits")

  @jax.jit
  @jax.value_and_grad
  def objective(theta):
    t = 1.0 + 20.0 * jax.nn.sigmoid(theta)
    values = losses.kl(
      jnp.float32(student), jnp.float32(teacher), temperature=t
    )
    return t**2 * values.mean()

  value, gradient = objective(case["params"]["global_T"])
  oracle.close(value, case["expected"], rtol=2e-5)
  # The source reverses the gradient: its temperature is an adversary. What is
  # left of T² KL's own slope is a difference of two larger terms.
  want = -case["expected_grad"]["global_T"][0]
  oracle.close(gradient, want, rtol=1e-3)


@pytest.mark.parametrize("name", TEXT)
def test_token_losses_agree(name):
  case = CASES[name]
  loss, static, hparams = TEXT[name]
  student, teacher, labels = inputs(
    case, "student_logits", "teacher_logits", "labels"
  )
  counts = labels != -100
  values, gradient, _ = oracle.compiled(loss, **static)(
    student, teacher, **hparams
  )
  oracle.close(values[counts].mean(), case["expected"])
  want = np.array(case["expected_grad"]["student_logits"])
  oracle.close(gradient * counts[..., None] / counts.sum(), want)


@pytest.mark.parametrize(
  ("loss", "side", "static"),
  [
    (losses.skew_kl, "teacher_pos", {}),
    (losses.skew_reverse_kl, "student_pos", {"detach_mixture": True}),
  ],
)
def test_skewed_losses_agree(loss, side, static):
  case = CASES[DISTILLM.format(side)]
  student, teacher, labels = inputs(
    case, "student_logits", "teacher_logits", "labels"
  )
  # The source shifts: the logits at t answer for the label at t + 1.
  counts = np.zeros(labels.shape, bool)
  counts[:, :-1] = labels[:, 1:] != -100
  values, gradient, _ = oracle.compiled(loss, **static)(
    student, teacher, skew=0.1
  )
  share = counts / counts.sum(axis=1, keepdims=True)
  oracle.close(np.sum(share * values, axis=1), case["expected"])
  want = np.array(case["expected_grad"]["student_logits"])
  oracle.close(share[..., None] * gradient, want)


def test_total_variation_agrees():
  case = CASES["liger.tvd_ref_batchmean_masked"]
  p, q, labels = inputs(case, "p", "q", "labels")
  values, _, _ = oracle.compiled(losses.total_variation)(np.log(q), np.log(p))
  oracle.close(values[labels != -100].mean(), case["expected"])


def test_soft_cross_entropy_agrees():
  case = CASES["minillm.get_distil_loss"]
  student, teacher, labels = inputs(
    case, "student_logits", "teacher_logits", "labels"
  )
  values, _, _ = oracle.compiled(losses.cross_entropy)(
    student, oracle.softmax(teacher)
  )
  oracle.close(values[labels != -100].mean(), case["expected"], rtol=2e-5)


def test_every_case_of_the_file_is_used():
  rest = {
    "ctkd.global_T_lambda-1",
    "liger.tvd_ref_batchmean_masked",
    "minillm.get_distil_loss",
    *(DISTILLM.format(side) for side in ("teacher_pos", "student_pos")),
  }
  assert set(CASES) == {*IMAGES, *TEXT, *rest}
