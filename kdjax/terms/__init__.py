"""Methods that are more than a loss on two taps: functions that build a `Term`.

    terms = [*hinton(alpha=0.1, temperature=4.0).terms,
             review("review", (stages, stages), weight=1.0)]

`(name, taps, *, weight, ...)`; the further arguments are what a config gives.
What they own is trained, or carried, and saved with the student, and is no part
of it (`self_relations` owns nothing, and reads several taps of a layer). For a
method that needs a learned map and nothing else, wrap a plain term in
`projectors.project`.
"""

from collections.abc import Callable

from kdjax.objective import Term
from kdjax.terms.contrastive import check_bank, crd, info_nce
from kdjax.terms.factor import factor
from kdjax.terms.features import (
  masked_generative,
  overhaul,
  simple,
  variational_information,
)
from kdjax.terms.review import review
from kdjax.terms.self_relations import self_relations

# By the name that a config gives.
TERMS: dict[str, Callable[..., Term]] = {
  "crd": crd,
  "factor": factor,
  "info_nce": info_nce,
  "masked_generative": masked_generative,
  "overhaul": overhaul,
  "review": review,
  "self_relations": self_relations,
  "simple": simple,
  "variational_information": variational_information,
}

__all__ = [
  "TERMS",
  "check_bank",
  "crd",
  "factor",
  "info_nce",
  "masked_generative",
  "overhaul",
  "review",
  "self_relations",
  "simple",
  "variational_information",
]
