"""What the facts of the examples add up to. Several seeds are taken together.

Facts are those of `kdjax.examples`; confidence, NLL and KL are means over
examples.
"""

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.evaluate import NUM_BINS
from kdjax.examples import Facts, badness
from kdjax.results import stderr

# What a token is, by its text alone, and in the order they are shown in.
KINDS = (
  "keyword",
  "word start",
  "inside a word",
  "number",
  "punctuation",
  "line break",
  "space",
  "special",
  "other",
)


class Bins(NamedTuple):
  """Examples by confidence: (0, 1/15], (1/15, 2/15] ..., each `[15]`.

  Attributes:
    examples: how many there are.
    accuracy, confidence: their means; NaN where there is none.
  """

  examples: np.ndarray
  accuracy: np.ndarray
  confidence: np.ndarray

  @property
  def ece(self) -> float:
    """Σ (bin's share) · |accuracy − confidence|, as `kdjax.evaluate` has it."""
    gap = np.abs(self.accuracy - self.confidence)
    return float(np.nansum(self.examples * gap) / self.examples.sum())


def calibration(seeds: Sequence[Facts]) -> Bins:
  """Guo et al. 2017, section 2: how often is it right that is so confident."""
  confidence = together(seeds, "confidence").astype(np.float64)
  right = together(seeds, "guess") == together(seeds, "label")
  known = np.isfinite(confidence)
  confidence, right = confidence[known], right[known]
  # In float32, as the evaluation does: a bin's end belongs to it.
  scaled = confidence.astype(np.float32) * np.float32(NUM_BINS)
  bins = np.ceil(scaled).astype(int) - 1
  count, hits, sure = (
    np.bincount(bins, weights, NUM_BINS)
    for weights in (np.ones(len(bins)), right, confidence)
  )
  with np.errstate(invalid="ignore"):
    return Bins(count, hits / count, sure / count)


def confusion(seeds: Sequence[Facts], num_classes: int) -> np.ndarray:
  """[teacher's guess, network's guess] -> examples."""
  theirs, ours = together(seeds, "teacher_guess"), together(seeds, "guess")
  pairs = np.int64(theirs) * num_classes + ours
  counts = np.bincount(pairs, minlength=num_classes**2)
  return counts.reshape(num_classes, num_classes)


def confused(seeds: Sequence[Facts], most: int) -> list[tuple[int, int, int]]:
  """(teacher's guess, network's guess, examples), differing, the most first."""
  theirs, ours = together(seeds, "teacher_guess"), together(seeds, "guess")
  differ = theirs != ours
  pairs = np.stack([theirs[differ], ours[differ]], -1)
  found, counts = np.unique(pairs, axis=0, return_counts=True)
  order = np.argsort(-counts, kind="stable")[:most]
  return [(int(found[n, 0]), int(found[n, 1]), int(counts[n])) for n in order]


def num_classes(seeds: Sequence[Facts]) -> int:
  """One more than the largest that occurs."""
  names = ("label", "guess", "teacher_guess")
  return 1 + max(int(f[n].max()) for f in seeds for n in names if n in f)


class Share(NamedTuple):
  """A class, or a kind of token, and what a network makes of it.

  Attributes:
    examples: of one seed, on the mean.
    accuracy, nll, kl: means over seeds; KL is NaN where nobody compares.
    errors: of each, its standard error; None for one seed.
  """

  examples: float
  accuracy: float
  nll: float
  kl: float
  errors: Mapping[str, float | None]


def by_group(
  seeds: Sequence[Facts], groups: Sequence[np.ndarray], size: int
) -> dict[int, Share]:
  """Group -> what its examples come to; those that occur in every seed.

  Args:
    groups: of each seed, the group of each example, 0 .. size - 1.
    size: the number of groups.
  """
  counts = np.stack([np.bincount(g, minlength=size) for g in groups])
  values: dict[str, np.ndarray] = {}
  for name in ("accuracy", "nll", "kl"):
    per_seed = []
    for facts, group, count in zip(seeds, groups, counts):
      if name == "accuracy":
        x = facts["guess"] == facts["label"]
      else:
        x = facts.get(name, np.full(len(group), np.nan))
      with np.errstate(invalid="ignore"):
        per_seed.append(np.bincount(group, x, size) / count)
    values[name] = np.stack(per_seed)
  found = {}
  for n in np.flatnonzero(counts.all(0)).tolist():
    column = {name: x[:, n].tolist() for name, x in values.items()}
    found[n] = Share(
      float(counts[:, n].mean()),
      **{name: float(np.mean(x)) for name, x in column.items()},
      errors={name: stderr(x) for name, x in column.items()},
    )
  return found


def kind(text: str, keywords: frozenset[str] = frozenset()) -> str:
  """Which of `KINDS` a token is.

  Args:
    text: as it is written, a space before it included.
    keywords: the language's, for source code.
  """
  bare = text.strip()
  if re.fullmatch(r"<[|/]?\w+[|]?>", bare):
    return "special"
  if not bare:
    return "line break" if "\n" in text else "space"
  if bare in keywords:
    return "keyword"
  if re.fullmatch(r"[\d_.]*\d[\d_.]*", bare):
    return "number"
  if not any(c.isalnum() or c == "_" for c in bare):
    return "other" if "\ufffd" in bare else "punctuation"
  if text[0].isspace() or not (text[0].isalnum() or text[0] == "_"):
    return "word start"
  return "inside a word"


def kinds(facts: Facts, keywords: frozenset[str] = frozenset()) -> np.ndarray:
  """The number in `KINDS` of each token that is to be predicted."""
  known = [
    KINDS.index(kind(text, keywords)) for text in facts["texts"].tolist()
  ]
  return np.array(known)[np.searchsorted(facts["ids"], facts["label"])]


def keywords(config: Mapping[str, Any]) -> frozenset[str]:
  """Python's, where the texts are its sources."""
  data = str(config.get("data.name")), str(config.get("data.path"))
  python = data[0] == "python_sources" or data[1].endswith(".py")
  return frozenset(keyword.kwlist) if python else frozenset()


def worst_windows(facts: Facts, width: int, most: int) -> list[slice]:
  """Stretches of tokens of one row whose mean KL is largest, that one first.

  Without a teacher to compare with, whose mean NLL is. Rows are cut every
  `width` tokens that count (of the longest row, if that has fewer); pieces
  under half of it are left out.
  """
  _, value = badness(facts)
  rows = facts["row"]
  starts = np.flatnonzero(np.diff(rows, prepend=-1))
  stops = np.append(starts[1:], len(rows))
  width = min(width, int((stops - starts).max(initial=1)))
  found = []
  for start, stop in zip(starts.tolist(), stops.tolist()):
    for at in range(start, stop, width):
      piece = slice(at, min(at + width, stop))
      if 2 * (piece.stop - piece.start) >= width:
        found.append((float(value[piece].mean()), piece))
  found.sort(key=lambda pair: -pair[0])
  return [piece for _, piece in found[:most]]


def together(seeds: Sequence[Facts], name: str) -> np.ndarray:
  return np.concatenate([facts[name] for facts in seeds])
