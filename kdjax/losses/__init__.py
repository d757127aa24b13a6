"""Equations on the class axis, `[*batch, classes]` -> float32 `[*batch]`.

p is the teacher, q the student; the temperature T divides both logits. A loss
masks nothing, averages nothing over the batch and multiplies by no T²: the
objective does, in one place. The teacher gets no gradient.

A class whose logit is -inf on either side leaves the support of both, and both
are renormalised over the rest. An empty support, or a label outside it, is NaN.

To add a loss, touch three files:
  1. `losses/<family>.py`: the function, `(student, teacher[, labels], *,
     temperature=1.0, ...)`, decorated by `@logit_loss(power=...)`;
  2. this one: its import, its name in `LOGIT_LOSSES`;
  3. `tests/losses/<family>_test.py`: its equation and gradient in float64. The
     contracts find it in `LOGIT_LOSSES`.
"""

from collections.abc import Callable
from typing import Any

from kdjax.losses.ab_divergence import alpha_beta
from kdjax.losses.batchwise import dist, multi_level
from kdjax.losses.divergences import (
  jeffreys,
  jsd,
  kl,
  reverse_kl,
  skew_kl,
  skew_reverse_kl,
  total_variation,
)
from kdjax.losses.labels import (
  cross_entropy,
  dkd,
  nkd,
  nkd_nontarget,
  nkd_target,
  teacher_free,
  teacher_label,
)
from kdjax.losses.logits import logit_mse, ttm, wttm
from kdjax.losses.traits import Traits, logit_loss, tap_loss, traits
from kdjax.losses.transforms import with_teacher_temperature, zscore

# The losses on logits, by the name that configs give them.
LOGIT_LOSSES: dict[str, Callable[..., Any]] = {
  "alpha_beta": alpha_beta,
  "cross_entropy": cross_entropy,
  "dist": dist,
  "dkd": dkd,
  "jeffreys": jeffreys,
  "jsd": jsd,
  "kl": kl,
  "logit_mse": logit_mse,
  "multi_level": multi_level,
  "nkd": nkd,
  "nkd_nontarget": nkd_nontarget,
  "nkd_target": nkd_target,
  "reverse_kl": reverse_kl,
  "skew_kl": skew_kl,
  "skew_reverse_kl": skew_reverse_kl,
  "teacher_free": teacher_free,
  "teacher_label": teacher_label,
  "total_variation": total_variation,
  "ttm": ttm,
  "wttm": wttm,
}

__all__ = [
  "LOGIT_LOSSES",
  "Traits",
  "alpha_beta",
  "cross_entropy",
  "dist",
  "dkd",
  "jeffreys",
  "jsd",
  "kl",
  "logit_loss",
  "logit_mse",
  "multi_level",
  "nkd",
  "nkd_nontarget",
  "nkd_target",
  "reverse_kl",
  "skew_kl",
  "skew_reverse_kl",
  "tap_loss",
  "teacher_free",
  "teacher_label",
  "total_variation",
  "traits",
  "ttm",
  "with_teacher_temperature",
  "wttm",
  "zscore",
]
