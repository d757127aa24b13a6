"""What a report says of the examples, against direct computations."""

import numpy as np
import pytest
import report_runs

from kdjax.examples import worst_first
from kdjax.report import measures
from kdjax.report.measures import KINDS


def test_calibration_against_a_loop_over_the_bins():
  seeds = [report_runs.facts(1), report_runs.facts(2)]
  seeds[0]["confidence"][:2] = [1.0, 1 / 15]  # ends belong to their bin
  got = measures.calibration(seeds)
  confidence = np.concatenate([f["confidence"] for f in seeds])
  right = np.concatenate([f["guess"] == f["label"] for f in seeds])
  ece = 0.0
  for n in range(15):
    low, high = np.float32(n / 15), np.float32((n + 1) / 15)
    inside = (confidence > low) & (confidence <= high)
    assert got.examples[n] == inside.sum()
    if inside.any():
      np.testing.assert_allclose(got.accuracy[n], right[inside].mean())
      sure = np.float64(confidence[inside]).mean()
      np.testing.assert_allclose(got.confidence[n], sure)
      ece += inside.mean() * abs(right[inside].mean() - sure)
  np.testing.assert_allclose(got.ece, ece)


def test_confusion_has_the_teacher_down_and_the_student_across():
  seeds = [report_runs.facts(1), report_runs.facts(2, size=200)]
  got = measures.confusion(seeds, 4)
  want = np.zeros((4, 4), int)
  for f in seeds:
    for theirs, ours in zip(f["teacher_guess"], f["guess"]):
      want[theirs, ours] += 1
  assert (got == want).all()
  assert (got != got.T).any()
  pairs = measures.confused(seeds, 100)
  counts = [n for *_, n in pairs]
  assert counts == sorted(counts, reverse=True)
  assert counts[0] > counts[-1]
  np.fill_diagonal(want, 0)
  assert {(a, b): n for a, b, n in pairs} == {
    (a, b): want[a, b] for a, b in np.argwhere(want).tolist()
  }
  assert len(measures.confused(seeds, 2)) == 2


def test_classes_add_up_to_all_examples():
  f = report_runs.facts(3)
  found = measures.by_group([f], [f["label"]], 4)
  assert sum(s.examples for s in found.values()) == 60
  for name in ("nll", "kl"):
    total = sum(s.examples * getattr(s, name) for s in found.values())
    np.testing.assert_allclose(total, f[name].sum(), rtol=1e-5)
  of_two = f["label"] == 2
  right = (f["guess"] == f["label"])[of_two].mean()
  np.testing.assert_allclose(found[2].accuracy, right)


def test_a_class_over_seeds_has_mean_and_standard_error():
  seeds = [report_runs.facts(4), report_runs.facts(5)]
  found = measures.by_group(seeds, [f["label"] for f in seeds], 4)
  a, b = (f["nll"][f["label"] == 1].mean() for f in seeds)
  np.testing.assert_allclose(found[1].nll, (a + b) / 2, rtol=1e-5)
  np.testing.assert_allclose(found[1].errors["nll"], abs(a - b) / 2, rtol=1e-4)


def test_kinds_of_tokens_add_up_to_all_tokens():
  f = report_runs.text_facts(6)
  words = frozenset({"def"})
  kinds = measures.kinds(f, words)
  found = measures.by_group([f], [kinds], len(KINDS))
  total = sum(s.examples * s.nll for s in found.values())
  np.testing.assert_allclose(total, f["nll"].sum(), rtol=1e-5)
  named = {KINDS[n]: s.examples for n, s in found.items()}
  assert named["keyword"] == (f["label"] == 0).sum()
  assert named["line break"] == (f["label"] == 4).sum()
  assert measures.keywords({"data.name": "python_sources"}) >= words
  assert not measures.keywords({"data.name": "", "data.path": "a.txt"})


@pytest.mark.parametrize(
  ("text", "kind"),
  [
    ("return", "keyword"),
    (" return", "keyword"),
    (" name", "word start"),
    ("_name", "inside a word"),
    ("ing", "inside a word"),
    (".name", "word start"),
    ("12", "number"),
    (" 1_000", "number"),
    ("__", "inside a word"),
    ("):", "punctuation"),
    ("  ", "space"),
    ("\n    ", "line break"),
    ("<|endoftext|>", "special"),
    ("</s>", "special"),
    ("\ufffd", "other"),
    ("größe", "inside a word"),
  ],
)
def test_the_kind_of_a_token_is_told_by_its_text(text, kind):
  assert measures.kind(text, frozenset({"return"})) == kind


def test_worst_windows_are_sorted_and_stay_within_a_row():
  f = report_runs.text_facts(7, size=50)  # rows of 20, 20, 10
  found = measures.worst_windows(f, 16, 10)
  # 16 + 4 tokens of a row: the piece of 4 is left out, that of 10 is not.
  assert sorted((s.start, s.stop) for s in found) == [
    (0, 16),
    (20, 36),
    (40, 50),
  ]
  means = [f["kl"][s].mean() for s in found]
  assert means == sorted(means, reverse=True)
  assert len(measures.worst_windows(f, 16, 2)) == 2
  # Rows shorter than the width are pieces themselves.
  found = measures.worst_windows(f, 64, 10)
  assert sorted(s.start for s in found) == [0, 20, 40]


def test_the_worst_are_the_farthest_from_the_teacher():
  f = report_runs.facts(8)
  kl = f["kl"][worst_first(f)]
  assert (np.diff(kl) <= 0).all()
  assert kl[0] > kl[-1]
  rounded = np.full(60, 1e-9)  # a teacher's, from itself
  nll = f["nll"][worst_first(f | {"kl": rounded})]
  assert (np.diff(nll) <= 0).all()
