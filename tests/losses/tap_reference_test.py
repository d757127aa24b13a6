"""Losses on activations against other libraries' own code.

A check, not a definition: the equation tests come first. The maps of the file
are NCHW. Each case says how its source reduces.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses import features, preactivations, transfer
from kdjax.projectors import convolve
from kdjax.terms.review import fuse

from . import oracle

_PATH = pathlib.Path(__file__).parents[1] / "data" / "tap_losses.json"
_DATA = json.loads(_PATH.read_text())
CASES = {case["name"]: case for case in _DATA["cases"]}

# {case: (loss, examples that the source adds up instead of averaging)}
MEANS = {
  "mdistiller.at_p2": (transfer.attention_transfer, 1),
  "mdistiller.at_p2_pool_8to4_channels_differ": (
    transfer.attention_transfer, 1
  ),
  "edge.at_p2_dead_student_sample": (transfer.attention_transfer, 1),
  "mdistiller.nst": (transfer.nst, 1),
  "fitnet.hint_mse": (features.hint, 1),
  "mdistiller.reviewkd_hcl_4x4": (features.review, 1),
  "repdistiller.ab_criterion_sum": (preactivations.activation_boundary, 4),
  "repdistiller.ft_p1_2_p2_1": (transfer.factor, 1),
}  # fmt: skip


def channels_last(x):
  x = np.asarray(x)
  return jnp.float32(np.moveaxis(x, 1, -1) if x.ndim == 4 else x)


def inputs(case):
  arrays = {k: _DATA["arrays"][v] for k, v in case["inputs"].items()}
  return {k: channels_last(v) for k, v in arrays.items()}


def kernel(x):
  """[out, in, ...] to [..., in, out]; `inputs` has moved `in` already."""
  return jnp.moveaxis(x, 0, -1)


def agrees(case, loss, **by_name):
  """A batch loss of the named inputs has the case's value and gradients."""
  value, gradient = jax.jit(jax.value_and_grad(loss))(by_name)
  oracle.close(value, case["expected"])
  for name, want in case["expected_grad"].items():
    if name in by_name:
      oracle.close(gradient[name], channels_last(want), what=name)


@pytest.mark.parametrize("name", MEANS)
def test_losses_of_two_activations_agree(name):
  case, (loss, count) = CASES[name], MEANS[name]
  teacher = inputs(case)["f_t"]
  agrees(
    case,
    lambda given: count * loss(given["f_s"], teacher).mean(),
    f_s=inputs(case)["f_s"],
  )


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_hints_on_tokens_agree(distance):
  case = CASES[f"distillkit.hidden_{distance}"]
  given = {k: np.array(_DATA["arrays"][v]) for k, v in case["inputs"].items()}
  exists = given["mask"] > 0
  per_layer = []
  for ours, theirs in case["params"]["layer_mapping"]:
    # The source averages over all tokens that exist: each as an example.
    student = given["student_hidden"][ours][exists]
    teacher = given["teacher_hidden"][theirs][exists]
    values = features.hint(
      jnp.float32(student), jnp.float32(teacher), distance=distance
    )
    per_layer.append(values.mean())
  oracle.close(np.mean(per_layer), case["expected"])


def test_variational_information_agrees():
  case = CASES["mdistiller.vid"]
  given = inputs(case)

  def loss(changed):
    hidden = jax.nn.relu(changed["f_s"] @ given["w1"].T)
    hidden = jax.nn.relu(hidden @ given["w2"].T)
    mean = hidden @ changed["w3"].T
    variance = jax.nn.softplus(changed["log_scale"]) + 1e-5
    values = features.variational_information(mean, given["f_t"], variance)
    return values.mean()

  agrees(case, loss, **{k: given[k] for k in ("f_s", "w3", "log_scale")})


def test_overhaul_agrees():
  case = CASES["mdistiller.ofd_feat_loss"]
  given = inputs(case)
  margin = given["margin"].reshape(-1)

  def loss(changed):
    student, teacher = changed["f_s"], given["f_t"]
    return preactivations.overhaul(student, teacher, margin).mean()

  agrees(case, loss, f_s=given["f_s"])


def test_masked_generative_agrees():
  case = CASES["modelopt.mgd_fixed_mask"]
  given = inputs(case)
  mask = jnp.float32(given["u"] <= 1 - case["params"]["lambda_mgd"])

  def generate(x):
    x = convolve(x, kernel(given["g1_w"])) + given["g1_b"].reshape(1, 1, 1, -1)
    x = convolve(jax.nn.relu(x), kernel(given["g2_w"]))
    return x + given["g2_b"].reshape(1, 1, 1, -1)

  def loss(changed):
    student, teacher = changed["f_s"], given["f_t"]
    return features.masked_generative(student, teacher, mask, generate).mean()

  agrees(case, loss, f_s=given["f_s"])


def test_flow_agrees():
  case = CASES["repdistiller.fsp_pair"]
  given = inputs(case)

  def loss(changed):
    ours = changed["s_bot"], given["s_top"]
    return transfer.flow(ours, (given["t_bot"], given["t_top"])).mean()

  agrees(case, loss, s_bot=given["s_bot"])


def test_simple_agrees():
  case = CASES["torchdistill.srd"]
  given = inputs(case)

  def loss(changed):
    values = features.simple(changed["f_s"], given["f_t"])
    # The source adds the KL of the logits.
    kl = losses.kl(given["student_logits"], given["teacher_logits"])
    return values.mean() + kl.mean()

  agrees(case, loss, f_s=given["f_s"])


def test_fusion_of_review_agrees():
  case = CASES["mdistiller.reviewkd_abf_fuse"]
  given = inputs(case)
  params = {
    "conv1": given["w1"].T,
    "norm1": {"scale": given["bn1_w"], "bias": given["bn1_b"]},
    "conv2": kernel(given["w2"]),
    "norm2": {"scale": given["bn2_w"], "bias": given["bn2_b"]},
    "attention": given["att_w"].T,
    "attention_bias": given["att_b"],
  }
  where = jnp.ones(2, bool)
  out, residual = fuse(params, given["x"], given["y"], (4, 4), where)
  oracle.close(out, channels_last(case["expected"]), atol=1e-5)
  want = case["expected_extra"]["residual"]
  oracle.close(residual, channels_last(want))


def test_every_case_of_the_file_is_used():
  rest = {
    "distillkit.hidden_mse", "distillkit.hidden_cosine", "mdistiller.vid",
    "mdistiller.ofd_feat_loss", "modelopt.mgd_fixed_mask",
    "repdistiller.fsp_pair", "torchdistill.srd", "mdistiller.reviewkd_abf_fuse",
  }  # fmt: skip
  assert set(CASES) == {*MEANS, *rest}
