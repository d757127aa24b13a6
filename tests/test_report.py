"""The page: what stands on it, what it refuses, and that it needs no other."""

import html.parser
import io
import json
import re

import numpy as np
import pytest
import report_runs
from PIL import Image

from kdjax import examples
from kdjax.report import command, curves, report, runs, style
from kdjax.results import NETWORKS


@pytest.fixture
def undrawn(monkeypatch):
  """Pictures of one pixel: the page alone is looked at."""
  drawn = io.BytesIO()
  Image.new("RGB", (1, 1)).save(drawn, format="png")
  monkeypatch.setattr(style, "png", lambda *_: drawn.getvalue())
  monkeypatch.setattr("kdjax.report.card.png", lambda *_, **__: b"card")


class Page(html.parser.HTMLParser):
  """The words, the tables and whatever a page points at."""

  def __init__(self, path):
    super().__init__()
    self.text, self.links, self.tags, self.tables = [], [], [], []
    self.inside, self.whole = False, path.read_text()
    self.feed(self.whole)
    self.words = " ".join(" ".join(self.text).split())

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      if name in ("src", "srcset", "href", "data", "action"):
        self.links.append(value)
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")
      self.inside = True

  def handle_endtag(self, tag):
    self.inside = self.inside and tag not in ("td", "th")

  def handle_data(self, data):
    if self.tags[-1:] != ["style"]:
      self.text.append(data)
    if self.inside:
      self.tables[-1][-1][-1] += data

  def table(self, cell):
    """The first table that has a cell so named, as {row: {column: cell}}."""
    head, *rows = next(t for t in self.tables if cell in t[0])
    return {row[0]: dict(zip(head, row)) for row in rows}


def page_of(*folders):
  return Page(report(folders))


def test_results_are_those_of_the_run(tmp_path, undrawn):
  page = page_of(report_runs.write(tmp_path / "run", seeds=3))
  rows = page.table("accuracy %")
  # 0.70, 0.72, 0.74: deviation 0.02, over the root of 3.
  assert rows["student alone"]["accuracy %"] == "72.00 ± 1.15"
  assert rows["teacher"]["NLL"] == "0.5000"
  assert "Distilled minus alone, accuracy %: +10.00 ± 0.00" in page.words
  rows = page.table("wall s")
  assert rows["teacher"]["wall s"] == "4.0"
  assert rows["teacher"]["compiling s"] == "1.0"
  assert rows["teacher"]["goodput"] == "75.0%"
  assert rows["teacher"]["planned"] == "3.0 MiB"
  assert page.table("value")["phases.alone.steps"]["value"] == "20"


def test_the_page_needs_nothing_from_elsewhere(tmp_path, monkeypatch):
  """Drawn, if coarsely: of both themes, inside and beside the page."""
  monkeypatch.setattr(style.png, "__defaults__", (48,))
  folder = report_runs.write(tmp_path / "run", seeds=2)
  path = report([folder])
  page = Page(path)
  assert "script" not in page.tags
  assert page.links
  assert all(x.startswith(("data:image/png;base64,", "#")) for x in page.links)
  assert "url(" not in page.whole
  assert "@import" not in page.whole
  assert page.whole.count("prefers-color-scheme: dark") > 10
  names = {p.name for p in path.parent.iterdir()} - {"index.html"}
  light = {n for n in names if "-dark" not in n}
  assert {
    "summary.png",
    "result_nll.png",
    "calibration.png",
    "size.png",
  } <= light
  assert {"confusion_student_alone.png", "loss_total.png", "time.png"} <= light
  for name in light:
    dark = Image.open(path.parent / name.replace(".png", "-dark.png"))
    shown = Image.open(path.parent / name)
    assert shown.size == dark.size
    # The corner is ground.
    grounds = [x.convert("RGB").getpixel((0, 0)) for x in (shown, dark)]
    assert grounds == [(255, 255, 255), (21, 25, 31)]
  assert Image.open(path.parent / "summary.png").width == 1200


def test_whatever_a_run_says_is_escaped(tmp_path, undrawn):
  evil = "<script>alert('&')</script>"
  names = np.array([evil, "b", "c", "d"])
  settings = report_runs.config(data={"name": evil})
  folder = report_runs.write(
    tmp_path / "<b>run",
    settings=settings,
    with_facts=lambda seed: report_runs.facts(seed, class_names=names),
  )
  page = page_of(folder)
  assert not {"script", "b>run"} & set(page.tags)
  assert evil in page.words
  assert "&lt;b&gt;run" in page.whole


def test_tokens_are_escaped_and_sums_of_kinds_are_shown(tmp_path, undrawn):
  folder = report_runs.write(
    tmp_path / "run", with_facts=report_runs.text_facts
  )
  page = page_of(folder)
  assert "<b>&" in page.words
  assert "&lt;b&gt;&amp;" in page.whole
  assert "i" not in page.tags
  assert "Kinds of tokens" in page.words
  assert "Worst stretches of text" in page.words
  assert re.search(r'title="KL [\d.]+, NLL [\d.]+; student: ', page.whole)


def test_texts_whose_teacher_reads_other_tokens(tmp_path, undrawn):
  folder = report_runs.write(
    tmp_path / "run",
    with_facts=lambda seed: report_runs.text_facts(seed, teacher=False),
  )
  page = page_of(folder)
  assert "Against the teacher" not in page.words
  assert "Of student distilled, first seed, by NLL" in page.words
  assert "lost most against teacher, NLL" in page.words


def test_the_worst_images_come_first(tmp_path, undrawn):
  folder = report_runs.write(tmp_path / "run")
  page = page_of(folder)
  facts = examples.read(folder / "seed_0/student_distilled/examples.npz")
  want = [f"{x:.2f}" for x in np.sort(facts["kl"])[::-1][:12]]
  shown = page.whole[page.whole.index("Worst images</h2>") :]
  assert re.findall(r"<figcaption><b>([\d.]+)</b>", shown) == want


def test_several_runs_stand_side_by_side(tmp_path, undrawn):
  settings = [
    report_runs.config(alpha=a, soft={"name": n})
    for a, n in ((0.1, "kl"), (0.5, "kl"), (0.1, "dkd"))
  ]
  folders = [
    report_runs.write(tmp_path / name, settings=c)
    for name, c in zip("abc", settings)
  ]
  page = page_of(*folders)
  assert (tmp_path / "a" / "report" / "index.html").exists()
  rows = page.table("accuracy %")
  assert set(rows) == {
    f"{run}: {n.replace('_', ' ')}" for run in "abc" for n in NETWORKS
  }
  differ = next(t for t in page.tables if t[0] == ["", "a", "b", "c"])
  assert differ[1:] == [
    ["alpha", "0.1", "0.5", "0.1"],
    ["soft.name", '"kl"', '"kl"', '"dkd"'],
  ]
  assert "a: worst images" in page.words


def test_runs_of_one_name_are_told_apart(tmp_path):
  folders = [report_runs.write(tmp_path / n / "run") for n in "ab"]
  assert [run.name for run in runs.read(folders)] == ["a/run", "b/run"]


@pytest.mark.parametrize(
  ("how", "says"),
  [
    (dict(with_facts=None), "No examples.npz of teacher of seed 0, student"),
    (dict(networks=NETWORKS[1:]), "No teacher: there is none yet"),
    (dict(networks=NETWORKS[:1], results=False), "No student distilled: there"),
    (dict(networks=NETWORKS[::2]), "No student alone: there is none yet"),
    (dict(steps=7), "teacher of seed 0 at step 7 of 20"),
  ],
)
def test_a_run_is_told_of_as_far_as_it_is(tmp_path, undrawn, how, says):
  page = page_of(report_runs.write(tmp_path / "run", **how))
  assert says in page.words
  assert "Results" in page.words


def test_without_results_the_last_evaluation_is_shown(tmp_path, undrawn):
  page = page_of(report_runs.write(tmp_path / "run", results=False))
  assert page.table("accuracy %")["teacher"]["accuracy %"] == "50.00"


def test_a_thousand_classes_make_pairs_and_no_matrix(tmp_path, undrawn):
  folder = report_runs.write(
    tmp_path / "run",
    with_facts=lambda seed: report_runs.facts(seed, 3000, 1000),
  )
  page = page_of(folder)
  names = {p.name for p in (folder / "report").iterdir()}
  assert not any("confusion" in name for name in names)
  assert {"groups_teacher.png", "groups_student_alone.png"} <= names
  assert len(page.table("teacher says")) <= 10
  assert len(page.whole) < 300_000


def test_the_line_under_way_is_left_out(tmp_path):
  folder = report_runs.write(tmp_path / "run")
  path = folder / "seed_0" / "teacher" / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 21, "loss/to')
  found = runs.metrics(path)
  assert found["loss/total"][-1, 0] == 20
  path.write_text('{"step": 1, "loss/total": null}\n')
  assert np.isnan(runs.metrics(path)["loss/total"][0, 1])


def _no_folder(folder):
  return folder / "nowhere"


def _no_run(folder):
  (folder / "config.json").unlink()
  return folder


def _nothing_yet(folder):
  (folder / "empty").mkdir()
  (folder / "config.json").rename(folder / "empty" / "config.json")
  return folder / "empty"


def _bad_line(folder):
  path = folder / "seed_0" / "teacher" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines[:2], "{cut", *lines[3:]]) + "\n")
  return folder


def _bad_step(folder):
  path = folder / "seed_0" / "teacher" / "metrics.jsonl"
  path.write_text('{"loss/total": 1.0}\n')
  return folder


def _bad_config(folder):
  (folder / "config.json").write_text("[1]")
  return folder


def _bad_facts(folder):
  (folder / "seed_0" / "teacher" / "examples.npz").write_bytes(b"PK")
  return folder


def _foreign_report(folder):
  (folder / "report").mkdir()
  (folder / "report" / "mine.txt").write_text("mine")
  return folder


def _foreign_page(folder):
  (folder / "report").mkdir()
  (folder / "report" / "index.html").write_text("<html>mine</html>")
  return folder


def _file_report(folder):
  (folder / "report").write_text("mine")
  return folder


@pytest.mark.parametrize(
  ("spoil", "says"),
  [
    (_no_folder, "nowhere does not exist: give the --workdir"),
    (_no_run, "run has no config.json, so it is no run"),
    (_nothing_yet, "has measured nothing yet"),
    (_bad_line, r"teacher/metrics\.jsonl, line 3 is damaged"),
    (_bad_step, r"metrics\.jsonl, line 1 is damaged"),
    (_bad_config, r"config\.json holds list, not a table"),
    (_bad_facts, r"examples\.npz is damaged"),
    (_foreign_report, "report holds something that is no report"),
    (_foreign_page, "report holds something that is no report"),
    (_file_report, "report is a file: name another --output"),
  ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
  tmp_path, capsys, undrawn, spoil, says
):
  folder = spoil(report_runs.write(tmp_path / "run"))
  before = sorted(tmp_path.rglob("*"))
  assert command.main(["report", str(folder)]) == 2
  told = capsys.readouterr().err
  assert re.search(says, told)
  assert told.startswith("kdjax: ")
  assert told.count("\n") == 1
  assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_into(tmp_path, capsys, undrawn):
  folder = report_runs.write(tmp_path / "run")
  assert command.main(["report", str(folder), "--output=/proc/report"]) == 2
  assert "cannot write into /proc/report" in capsys.readouterr().err


def test_a_report_is_replaced_and_no_other_file(tmp_path, capsys, undrawn):
  folder = report_runs.write(tmp_path / "run")
  page = report([folder])
  stale = page.parent / "confusion_student_alone.png"
  assert stale.exists()
  mine = page.parent / "mine.png"
  mine.write_text("mine")
  for path in folder.rglob("examples.npz"):
    path.unlink()
  assert report([folder]) == page
  assert not stale.exists()
  assert mine.read_text() == "mine"
  # A file that lies where a picture would is not the report's.
  stale.write_text("mine")
  assert command.main(["report", str(folder)]) == 0
  report_runs.write(tmp_path / "other")
  other = tmp_path / "other"
  assert command.main(["report", str(other), f"--output={page.parent}"]) == 2
  assert stale.read_text() == "mine"
  assert "confusion_student_alone.png is no picture" in capsys.readouterr().err


def test_help_and_arguments(tmp_path, capsys):
  assert command.main(["report", "--help"]) == 0
  assert "python -m kdjax.report runs/digits" in capsys.readouterr().out
  assert command.main(["report"]) == 2
  assert command.main(["report", "--output=x"]) == 2
  assert "name the --workdir of a run" in capsys.readouterr().err
  assert command.main(["report", "--outptu=x", "y"]) == 2
  assert "outptu" in capsys.readouterr().err
  folder = str(report_runs.write(tmp_path / "run"))
  assert command.main(["report", folder, folder]) == 2
  assert "named twice" in capsys.readouterr().err


def network(values):
  steps = np.arange(1, len(values) + 1)
  rows = np.stack([steps, values], -1).astype(float)
  return runs.Network({"x": rows}, {}, {}, None)


def test_a_curve_is_the_mean_of_its_seeds_with_their_standard_error():
  found = curves.line([network([1, 2, 5]), network([3, 2, np.nan])], "x")
  np.testing.assert_allclose(found.steps, [1, 2, 3])
  np.testing.assert_allclose(found.mean, [2, 2, 5])
  np.testing.assert_allclose(found.error, [1, 0, 0])
  alone = curves.line([network([1, 2, 5])], "x")
  assert alone.error is None
  assert curves.line([network([1])], "y") is None


def test_a_long_curve_is_averaged():
  values = np.arange(3000.0)
  found = curves.line([network(values)], "x")
  assert len(found.steps) <= 150
  np.testing.assert_allclose(found.mean.mean(), values.mean(), rtol=1e-3)
  assert (np.diff(found.mean) > 0).all()
  few = 3000 / len(found.steps)
  np.testing.assert_allclose(found.mean, found.steps - 1, atol=few)
  json.dumps(found.mean.tolist())
