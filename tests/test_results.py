"""Means, standard errors and the table of a run."""

import pytest

from kdjax.results import summary, table


def run(accuracy):
  metrics = dict(
    parameters=5142,
    flops=8.1e4,
    accuracy=accuracy,
    nll=0.5,
    ece=0.02,
    agreement=0.9,
    kl=0.1,
  )
  return {
    "teacher": metrics | {"accuracy": 0.99},
    "student_alone": metrics | {"accuracy": accuracy - 0.1},
    "student_distilled": metrics,
  }


def test_one_seed_has_no_standard_error():
  results = summary([run(0.9)])
  assert results["student_distilled"]["accuracy"] == 0.9
  assert results["stderr"]["teacher"]["nll"] is None
  assert results["gain"]["accuracy"]["mean"] == pytest.approx(0.1)
  text = table(results)
  assert "±" not in text
  assert "distillation gains +10.00 points of accuracy" in text


def test_several_seeds_give_mean_and_standard_error():
  results = summary([run(0.90), run(0.94)])
  assert results["student_distilled"]["accuracy"] == pytest.approx(0.92)
  # Sample deviation 0.02 * sqrt(2), over sqrt(2).
  assert results["stderr"]["student_distilled"]["accuracy"] == pytest.approx(
    0.02
  )
  # Seed by seed the gain is the same.
  assert results["gain"]["accuracy"]["stderr"] == pytest.approx(0, abs=1e-9)
  text = table(results)
  assert "92.00 ± 2.00" in text
  assert "2 seeds" in text


def test_the_table_has_a_row_for_each_network_and_straight_columns():
  head, rule, *rows = table(summary([run(0.9), run(0.8)])).splitlines()
  names = ["teacher", "alone", "distilled"]
  assert [r.split("  ")[0] for r in rows[:3]] == names
  assert len({len(r) for r in [head, rule, *rows[:3]]}) == 1


def test_the_table_of_one_seed_fits_a_terminal():
  large = {"parameters": 25_557_032, "flops": 6e8}
  rows = {name: one | large for name, one in run(1.0).items()}
  assert max(map(len, table(summary([rows])).splitlines())) <= 80
