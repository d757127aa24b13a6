"""Equations on arrays: one float32 number for each example.

Losses on logits reduce the class axis, `[*batch, classes]` -> `[*batch]`. p is
the teacher, q the student; the temperature T divides both logits. A loss
masks nothing, averages nothing over the batch and multiplies by no T²: the
objective does, in one place. The teacher gets no gradient.

A class whose logit is -inf on either side leaves the support of both, and both
are renormalised over the rest. An empty support, or a label outside it, is NaN.

Losses on activations take maps `[B, H, W, C]`, tokens `[B, S, D]` or vectors
`[B, D]`, and give `[B]`. Those that compare examples with one another say so
(`couples`), and take `where` [B], the examples that exist. Of a text every
token is an example: `[B, S, D]` comes as `[B · S, D]`, unless a loss says that
it takes whole sequences.

To add a loss, touch three files:
  1. `losses/<family>.py`: the function, `(student, teacher[, labels], *,
     temperature=1.0, ...)` decorated by `@logit_loss(power=...)`, or `(student,
     teacher, *, ...)` decorated by `@tap_loss()`;
  2. this one: its import, its name in `LOGIT_LOSSES` or `TAP_LOSSES`;
  3. `tests/losses/<family>_test.py`: its equation and gradient in float64. The
     contracts find it in those two.
"""

from collections.abc import Callable
from typing import Any

from kdjax.losses.ab_divergence import alpha_beta
from kdjax.losses.batchwise import dist, multi_level
from kdjax.losses.contrastive import info_nce, noise_contrastive
from kdjax.losses.cross_tokenizer import likelihood_matching, universal_logits
from kdjax.losses.divergences import (
  jeffreys,
  jsd,
  kl,
  reverse_kl,
  skew_kl,
  skew_reverse_kl,
  total_variation,
)
from kdjax.losses.features import (
  hint,
  masked_generative,
  review,
  simple,
  variational_information,
)
from kdjax.losses.information import correlation, mutual
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
from kdjax.losses.preactivations import (
  activation_boundary,
  overhaul,
  overhaul_margin,
)
from kdjax.losses.relations import (
  correlation_congruence,
  inter_channel,
  probabilistic,
  relational_angle,
  relational_distance,
  similarity_preserving,
)
from kdjax.losses.self_relations import self_relations
from kdjax.losses.traits import Traits, logit_loss, tap_loss, traits
from kdjax.losses.transfer import (
  attention_maps,
  attention_transfer,
  factor,
  flow,
  nst,
)
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

# Those on logits of two tokenizations, one number a span, likewise.
SPAN_LOSSES: dict[str, Callable[..., Any]] = {
  "likelihood_matching": likelihood_matching,
  "universal_logits": universal_logits,
}

# The losses on activations alone, by the name that configs give. Those that
# need more (a margin, a variance, a generator, a bank) are in `kdjax.terms`.
TAP_LOSSES: dict[str, Callable[..., Any]] = {
  "activation_boundary": activation_boundary,
  "attention_maps": attention_maps,
  "attention_transfer": attention_transfer,
  "correlation": correlation,
  "correlation_congruence": correlation_congruence,
  "factor": factor,
  "flow": flow,
  "hint": hint,
  "info_nce": info_nce,
  "inter_channel": inter_channel,
  "mutual": mutual,
  "nst": nst,
  "probabilistic": probabilistic,
  "relational_angle": relational_angle,
  "relational_distance": relational_distance,
  "review": review,
  "similarity_preserving": similarity_preserving,
  "simple": simple,
}

__all__ = [
  "LOGIT_LOSSES",
  "SPAN_LOSSES",
  "TAP_LOSSES",
  "Traits",
  "activation_boundary",
  "alpha_beta",
  "attention_maps",
  "attention_transfer",
  "correlation",
  "correlation_congruence",
  "cross_entropy",
  "dist",
  "dkd",
  "factor",
  "flow",
  "hint",
  "info_nce",
  "inter_channel",
  "jeffreys",
  "jsd",
  "kl",
  "likelihood_matching",
  "logit_loss",
  "logit_mse",
  "masked_generative",
  "multi_level",
  "mutual",
  "nkd",
  "nkd_nontarget",
  "nkd_target",
  "noise_contrastive",
  "nst",
  "overhaul",
  "overhaul_margin",
  "probabilistic",
  "relational_angle",
  "relational_distance",
  "reverse_kl",
  "review",
  "self_relations",
  "similarity_preserving",
  "simple",
  "skew_kl",
  "skew_reverse_kl",
  "tap_loss",
  "teacher_free",
  "teacher_label",
  "total_variation",
  "traits",
  "ttm",
  "universal_logits",
  "variational_information",
  "with_teacher_temperature",
  "wttm",
  "zscore",
]
