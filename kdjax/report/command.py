"""Writes a page about one run, or one that compares several.

    python -m kdjax.report runs/digits
    python -m kdjax.report runs/kl runs/dkd runs/crd --output=compared

  WORKDIR ...      folders of kdjax.train, finished or under way
  --output=FOLDER  where to; default: report/ in the first WORKDIR
  --help           this text

The folder gets index.html, one file that needs no other and no network, and its
pictures as PNG, in light and in dark (-dark.png); summary.png is the run in one
picture. Another report in the folder is replaced, anything else is left alone.

Exit codes: 0 done, 2 a mistake that the message explains.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from kdjax import commands, files
from kdjax.errors import UserError
from kdjax.report import about, against, sections, worst
from kdjax.report.card import card
from kdjax.report.html import Html, el, page
from kdjax.report.runs import Run, read
from kdjax.report.sections import Section

_INDEX = "index.html"
_MADE_BY = '<meta name="generator" content="kdjax.report">'


def report(
  workdirs: Sequence[str | Path], output: str | Path | None = None
) -> Path:
  """Writes the report of one run or several; returns the page's path.

  Args:
    workdirs: folders of `kdjax.train`, in buckets too.
    output: default: `report` in the first of them.

  Raises:
    UserError: no run in a folder, a damaged file, or an output that holds
      something else or cannot be written into.
  """
  if not workdirs:
    raise UserError("got no folder: name the --workdir of a run, see --help")
  folder = files.path(output or files.path(workdirs[0]) / "report")
  runs = read(workdirs)
  old = _claim(folder)
  parts = _sections(runs)
  pictures = card(runs)
  for made in (p for part in parts for p in part.pictures):
    pictures[f"{made.name}.png"] = made.light
    pictures[f"{made.name}-dark.png"] = made.dark
  foreign = [n for n in pictures if n not in old and (folder / n).exists()]
  if foreign:
    raise UserError(
      f"{folder / foreign[0]} is no picture of a report: move it away, or name "
      "another --output"
    )
  whole = page(_title(runs), _body(runs, parts), sorted(pictures))
  _write(folder, whole, pictures, old)
  return folder / _INDEX


def _sections(runs: Sequence[Run]) -> list[Section]:
  """In the order of the page; of several runs some parts are there for each."""
  alone = len(runs) == 1
  made = [
    sections.results(runs),
    sections.size(runs),
    about.differences(runs),
    sections.training(runs),
    sections.calibration(runs),
  ]
  for n, run in enumerate(runs):
    for make in (
      against.against_teacher,
      against.groups,
      worst.worst,
      worst.samples,
    ):
      part = make(run)
      if part is not None and not alone:
        part = sections.of_run(part, run, n)
      made.append(part)
  made += [about.time(runs), about.config(runs)]
  return [part for part in made if part is not None]


def _title(runs: Sequence[Run]) -> str:
  return f"kdjax: {', '.join(run.name for run in runs)}"


def _body(runs: Sequence[Run], parts: Sequence[Section]) -> list[Html]:
  links = [
    el("a", part.title, href=f"#part-{n}") for n, part in enumerate(parts)
  ]
  told = [
    el("p", f"{run.name}: {line}" if len(runs) > 1 else line, class_="note")
    for run in runs
    for line in about.notes(run)
  ]
  head = [
    el("h1", " · ".join(run.name for run in runs)),
    *(
      el(
        "p", f"{run.name}: " * (len(runs) > 1), about.line(run), class_="faint"
      )
      for run in runs
    ),
    el("nav", *links),
    *told,
  ]
  body = [
    el("section", el("h2", part.title), part.body, id=f"part-{n}")
    for n, part in enumerate(parts)
  ]
  return [el("header", *head), el("main", *body)]


def _claim(folder: Path) -> set[str]:
  """Makes the folder; returns the pictures of the report that is in it.

  Raises:
    UserError: it holds something else, or cannot be written into.
  """
  index = folder / _INDEX
  try:
    if folder.exists() and not folder.is_dir():
      raise UserError(f"{folder} is a file: name another --output")
    if folder.exists() and any(folder.iterdir()):
      page = index.read_bytes() if index.exists() else b""
      head = page[:20_000].decode(errors="replace")
      if _MADE_BY not in head:
        raise UserError(
          f"{folder} holds something that is no report: name another --output"
        )
      listed = re.search(r'name="kdjax-files" content="([^"]*)"', head)
      return set(listed[1].split()) if listed else set()
    probe = folder / f"{_INDEX}.part"
    files.write(probe, b"")
    probe.unlink()
  except OSError as error:
    raise UserError(
      f"cannot write into {folder} ({error.strerror}): name another --output"
    ) from error
  return set()


def _write(
  folder: Path, whole: str, pictures: Mapping[str, bytes], old: set[str]
) -> None:
  try:
    # The page first: it says which pictures are a report's.
    files.write(folder / _INDEX, whole.encode())
    for name, content in pictures.items():
      files.write(folder / name, content)
    for name in old - set(pictures):
      if Path(name).name == name and name.endswith(".png"):
        (folder / name).unlink(missing_ok=True)
  except OSError as error:
    raise UserError(
      f"cannot write into {folder} ({error.strerror}): name another --output"
    ) from error


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code."""

  def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("output", None, "", flag_values=values)

  def body() -> int:
    given, workdirs = commands.parse(argv, define)
    print(report(workdirs, given["output"]))
    return 0

  return commands.run(argv, __doc__, body)
