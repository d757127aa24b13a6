"""The parts of the page: each a heading, what it says, and pictures."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.report import charts, curves, measures
from kdjax.report.charts import Bar
from kdjax.report.html import Html, el, image, join, photo, pictures, table
from kdjax.report.measures import KINDS, Facts, Share
from kdjax.report.runs import Run
from kdjax.report.style import Picture
from kdjax.results import COLUMNS, NETWORKS, stderr

_WORST_ROWS = 10  # of a table of classes or pairs
_SHOWN = 12  # images, and classes in a picture where there are many
_WIDTH, _WINDOWS = 64, 6  # tokens of a stretch, stretches
STUDENTS = NETWORKS[1:]


def beside(made: Sequence[Picture], says: str) -> Html:
  """A picture, and what it says at its side."""
  return el("div", *map(image, made), el("p", says), class_="pictures")


class Section(NamedTuple):
  title: str
  body: Html
  pictures: Sequence[Picture] = ()


def plain(network: str) -> str:
  return network.replace("_", " ")


def short(network: str) -> str:
  return network.removeprefix("student_")


def bars(runs: Sequence[Run]) -> list[Bar]:
  """A bar for each network of each run."""
  found = []
  for n, run in enumerate(runs):
    for network, values in measures.outcomes(run).items():
      alone = len(runs) == 1
      label = plain(network) if alone else f"{run.name}: {plain(network)}"
      look = NETWORKS.index(network) if alone else n
      found.append(Bar(label, look, values))
  return found


def results(runs: Sequence[Run]) -> Section:
  """The table, what distillation gains, and bars."""
  shown = bars(runs)
  columns = [n for n in COLUMNS if any(bar.values.get(n) for bar in shown)]
  rows = [
    [bar.label, *(cell(bar.values.get(n), n) for n in columns)] for bar in shown
  ]
  head = ["", *(COLUMNS[n][0] for n in columns)]
  counts = {len(v) for bar in shown for v in bar.values.values() if v}
  seeds = f"{min(counts, default=0)}"
  if len(counts) > 1:
    seeds += f" to {max(counts)}"
  caption = "of the held-out data, after the last update"
  if max(counts, default=0) > 1:
    caption += f"; means over {seeds} seeds ± one standard error"
  gains = [_gain(run, named=len(runs) > 1) for run in runs]
  body = [table(head, rows, caption=caption), *gains]
  quality = [n for n in columns if n not in ("parameters", "flops")]
  quality = [n for n in quality if n != "flops_per_token"]
  made = [charts.side_by_side(shown, name) for name in quality]
  body.append(pictures(made))
  return Section("Results", join(body), made)


def cell(values: Sequence[float] | None, name: str) -> str:
  if not values:
    return "–"
  _, factor, form = COLUMNS[name]
  text = f"{factor * statistics.fmean(values):{form}}"
  error = stderr(values)
  return f"{text} ± {factor * error:{form}}" if error else text


def _gain(run: Run, *, named: bool) -> Html | None:
  """Distilled minus alone, seed by seed."""
  found = measures.outcomes(run)
  name = _quality(found)
  alone, distilled = (found.get(n, {}).get(name, ()) for n in STUDENTS)
  if not alone or len(alone) != len(distilled):
    return None
  title, factor, form = COLUMNS[name]
  gains = [factor * (b - a) for a, b in zip(alone, distilled)]
  text = f"{statistics.fmean(gains):+{form}}"
  error = stderr(gains)
  if error is not None:
    text += f" ± {error:{form}} (standard error over {len(gains)} seeds)"
  where = f"{run.name}: d" if named else "D"
  return el("p", f"{where}istilled minus alone, {title}: ", el("b", text), ".")


def _quality(found: Mapping[str, Mapping[str, Any]]) -> str:
  """The metric that a task is judged by."""
  there = set().union(*found.values()) if found else set()
  return "bits_per_byte" if "bits_per_byte" in there else "accuracy"


def size(runs: Sequence[Run]) -> Section | None:
  shown = bars(runs)
  if not any(bar.values.get("parameters") for bar in shown):
    return None
  name = _quality({bar.label: bar.values for bar in shown})
  made = [charts.sizes(shown, name)]
  says = "Up and to the left is better."
  if name == "bits_per_byte":
    says = "Down and to the left is better."
  return Section("Size", beside(made, says), made)


def training(runs: Sequence[Run]) -> Section:
  shown = curves.series(runs)
  loss = curves.losses(shown, one_run=len(runs) == 1)
  held_out, others = curves.held_out(shown), curves.others(shown)
  several = any(len(s.seeds) > 1 for s in shown)
  band = "Bands are one standard error over the seeds. " if several else ""
  whose = "" if len(runs) == 1 else "Each line is the student of a run. "
  body = [
    el(
      "p",
      f"{whose}{band}Long runs are averaged over steps, to 150 points a line.",
      class_="faint",
    ),
    el("h3", "Held-out data") if held_out else None,
    pictures(held_out),
    el("h3", "Losses and schedules"),
    pictures(loss),
    el("h3", "What else was logged") if others else None,
    pictures(others),
  ]
  return Section("Curves", join(body), [*held_out, *loss, *others])


def calibration(runs: Sequence[Run]) -> Section | None:
  if len(runs) == 1:
    (run,) = runs
    given = [
      (plain(n), NETWORKS.index(n), run.facts(n))
      for n in run.networks
      if run.facts(n)
    ]
  else:
    given = [
      (curves.label_of(run), n, run.facts(curves.last_network(run)))
      for n, run in enumerate(runs)
      if run.facts(curves.last_network(run))
    ]
  if not given:
    return None
  lines = [(a, n, measures.calibration(facts)) for a, n, facts in given]
  made = [charts.reliability(lines)]
  says = (
    "Among the examples on which a network is so confident, the share on which "
    "it is right. Below the diagonal it is too sure of itself. The lower panel "
    "is how often it is so confident, and so is the size of the marks: small "
    "ones say little. Seeds are taken together."
  )
  return Section("Calibration", beside(made, says), made)


def against_teacher(run: Run) -> Section | None:
  """Who says what: a matrix of few classes, the most frequent pairs of all."""
  made, body = [], []
  for network in STUDENTS:
    seeds = [f for f in run.facts(network) if "teacher_guess" in f]
    if not seeds:
      continue
    size = measures.num_classes(seeds)
    names = _class_names(seeds, size)
    if size <= charts.FEW:
      counts = measures.confusion(seeds, size)
      labels = [str(names(n)) for n in range(size)]
      made.append(
        charts.matrix(f"confusion_{network}", plain(network), counts, labels)
      )
    pairs = measures.confused(seeds, _WORST_ROWS)
    total = sum(len(f["guess"]) for f in seeds)
    apart = sum(int(np.sum(f["guess"] != f["teacher_guess"])) for f in seeds)
    body.append(
      table(
        ["teacher says", "student says", "examples"],
        [[names(a), names(b), f"{n:,}"] for a, b, n in pairs],
        caption=(
          f"{plain(network)}: differs from the teacher on {apart:,} of "
          f"{total:,} ({apart / total:.1%}), most often so"
        ),
      )
    )
  if not body:
    return None
  says = "Where the student's most likely class is not the teacher's."
  if made:
    says += " Counts over all seeds; what they agree on is grey."
  tables = el("div", *body, class_="pictures")
  return Section(
    "Against the teacher", join([el("p", says), pictures(made), tables]), made
  )


def _class_names(seeds: Sequence[Facts], size: int) -> Callable[[int], object]:
  for facts in seeds:
    if "texts" in facts:
      known = {
        int(i): t
        for f in seeds
        for i, t in zip(f["ids"].tolist(), f["texts"].tolist())
      }
      return lambda n: el("code", _visible(known.get(n, str(n))))
    if len(facts.get("class_names", ())) >= size:
      names = facts["class_names"].tolist()
      return lambda n: names[n]
  return str


def _visible(text: str) -> str:
  """A token with its spaces and ends of line."""
  shown = text.replace("\n", "↵").replace("\t", "→").replace("\r", "␍")
  return shown.replace(" ", "␣") or "∅"


def groups(run: Run) -> Section | None:
  """Classes, or kinds of tokens, and what each network makes of them."""
  found: dict[str, dict[int, Share]] = {}
  names: Callable[[int], object] = str
  texts = any("texts" in f for n in run.networks for f in run.facts(n))
  words = measures.keywords(run.config)
  for network in run.networks:
    seeds = run.facts(network)
    if not seeds:
      continue
    if texts:
      of = [measures.kinds(f, words) for f in seeds]
      found[network] = measures.by_group(seeds, of, len(KINDS))
      names = KINDS.__getitem__
    else:
      size = measures.num_classes(seeds)
      names = _class_names(seeds, size)
      of = [f["label"] for f in seeds]
      found[network] = measures.by_group(seeds, of, size)
  if not found:
    return None
  which = "nll" if texts else "accuracy"
  shown = [n for n in STUDENTS if n in found][-1:] or list(found)
  (ours,) = shown[:1]
  rivals = [n for n in ("teacher", "student_alone") if n in found and n != ours]
  body, made = [], []
  for rival in rivals or [ours]:
    lost = _lost(found[ours], found[rival], which)
    if not lost:
      continue
    body.append(_lost_table(run, found, lost, names, ours, rival, which))
    if made and len(lost) <= charts.FEW:
      continue  # the picture has them all already
    most = len(lost) if len(lost) <= charts.FEW else _SHOWN
    ids = [n for n, _ in lost[:most]]
    title = "Accuracy of each class" if not texts else "NLL of each kind"
    if most < len(lost):
      title = f"Lost most against {plain(rival)}"
    made.append(
      charts.dumbbells(
        f"groups_{rival}",
        title,
        "NLL, nats a token" if texts else "accuracy",
        [_bare(names(n)) for n in ids],
        [
          (plain(network), NETWORKS.index(network), [s.get(n) for n in ids])
          for network, s in found.items()
        ],
        which,
      )
    )
  says = (
    "A kind is told by the token's text alone: whether a space or a sign comes "
    "before it, or letters."
    if texts
    else "Classes by their label, those first where the student lost most."
  )
  title = "Kinds of tokens" if texts else "Classes"
  tables = el("div", *body, class_="pictures")
  return Section(title, join([el("p", says), pictures(made), tables]), made)


def _bare(name: object) -> str:
  text = str(name)
  return text if len(text) <= 22 else text[:21] + "…"


def _lost(
  ours: Mapping[int, Share], theirs: Mapping[int, Share], which: str
) -> list[tuple[int, float]]:
  """(group, by how much we are worse), the most first."""
  sign = 1 if which == "nll" else -1
  found = [
    (n, sign * (getattr(share, which) - getattr(theirs[n], which)))
    for n, share in ours.items()
    if n in theirs
  ]
  return sorted(found, key=lambda pair: -pair[1])


def _lost_table(
  run: Run,
  found: Mapping[str, Mapping[int, Share]],
  lost: Sequence[tuple[int, float]],
  names: Callable[[int], object],
  ours: str,
  rival: str,
  which: str,
) -> Html:
  factor, form = (1, ".3f") if which == "nll" else (100, ".1f")
  rows = []
  for n, by in lost[:_WORST_ROWS]:
    if by < 1e-9:
      break
    mine, other = found[ours][n], found[rival][n]
    row = [
      names(n),
      f"{mine.examples:,.0f}",
      f"{factor * getattr(other, which):{form}}",
      f"{factor * getattr(mine, which):{form}}",
      f"{factor * by:+{form}}",
    ]
    if which == "nll":
      row.append("–" if math.isnan(mine.kl) else f"{mine.kl:.3f}")
    rows.append(row)
  if not rows:
    return el("p", f"Nothing lost against {plain(rival)}.")
  unit = "NLL" if which == "nll" else "accuracy %"
  head = ["", "examples", short(rival), short(ours), "lost"]
  return table(
    [*head, "KL"] if which == "nll" else head,
    rows,
    caption=f"lost most against {plain(rival)}, {unit}",
  )


def worst(run: Run) -> Section | None:
  """Images, or stretches of text, of the first seed that has any."""
  for network in reversed(run.networks):
    seeds = run.facts(network)
    if seeds:
      facts = seeds[0]
      texts = "texts" in facts
      body = _worst_texts(facts) if texts else _worst_images(facts)
      what = "stretches of text" if texts else "images"
      title = f"Worst {what}"
      by = "KL from the teacher" if np.any(facts.get("kl", 0)) else "NLL"
      says = f"Of {plain(network)}, first seed, by {by} (nats). "
      return Section(title, join([el("p", says), body]))
  return None


def _worst_images(facts: Facts) -> Html:
  from kdjax.examples import worst_first

  size = measures.num_classes([facts])
  names = _class_names([facts], size)
  value = facts["kl"] if np.any(facts.get("kl", 0)) else facts["nll"]
  order = worst_first(facts)[:_SHOWN].tolist()
  most = max(float(value[order[0]]), 1e-9) if order else 1.0
  cards = []
  for n in order:
    pixels = facts.get(f"image_{int(facts['row'][n])}")
    if pixels is None:
      continue
    label, guess = int(facts["label"][n]), int(facts["guess"][n])
    lines = [
      el("b", f"{value[n]:.2f}"),
      el("br"),
      f"student: {names(guess)} ({facts['confidence'][n]:.0%})",
    ]
    if "teacher_guess" in facts:
      teacher = int(facts["teacher_guess"][n])
      lines += [el("br"), f"teacher: {names(teacher)}"]
    lines += [el("br"), f"label: {names(label)}"]
    says = f"test image {int(facts['row'][n])}, label {names(label)}"
    framed = el(
      "div",
      photo(pixels, says),
      style=f"color: {_heat(float(value[n]) / most)}",
    )
    cards.append(el("figure", framed, el("figcaption", *lines)))
  return el("div", *cards, class_="cards")


def _worst_texts(facts: Facts) -> Html:
  known = dict(zip(facts["ids"].tolist(), facts["texts"].tolist()))
  value = facts["kl"] if np.any(facts.get("kl", 0)) else facts["nll"]
  most = max(float(np.quantile(value, 0.99)), 1e-9)
  scale = el(
    "p",
    *(
      join([el("span", class_="key", style=_shade(x)), f" {x * most:.1f} "])
      for x in (0.0, 0.25, 0.5, 0.75, 1.0)
    ),
    "and more; dotted: the student's most likely token is not the teacher's.",
    class_="faint",
  )
  blocks: list[Html] = [scale]
  for piece in measures.worst_windows(facts, _WIDTH, _WINDOWS):
    spans = [
      _token(facts, n, known, float(value[n]) / most)
      for n in range(piece.start, piece.stop)
    ]
    row = int(facts["row"][piece.start])
    blocks.append(
      el("p", f"row {row}, mean {value[piece].mean():.2f}", class_="faint")
    )
    blocks.append(el("div", *spans, class_="tokens"))
  return join(blocks)


def _token(
  facts: Facts, n: int, known: Mapping[int, str], share: float
) -> Html:
  text = known[int(facts["label"][n])]
  guess = known[int(facts["guess"][n])]
  told = f"NLL {facts['nll'][n]:.2f}; student: {_visible(guess)}"
  other = False
  if "teacher_guess" in facts:
    teacher = int(facts["teacher_guess"][n])
    other = teacher != int(facts["guess"][n])
    told = (
      f"KL {facts['kl'][n]:.2f}, {told}; teacher: {_visible(known[teacher])}"
    )
  shown = text.replace("\n", "↵\n").replace("\t", "→")
  return el(
    "span",
    shown or "∅",
    title=told,
    style=_shade(share),
    class_="other" if other else None,
  )


def _heat(share: float) -> str:
  """The colour of a frame."""
  return f"rgba(213, 94, 0, {0.15 + 0.85 * min(max(share, 0), 1):.2f})"


def _shade(share: float) -> str:
  return f"background: rgba(222, 108, 20, {0.75 * min(max(share, 0), 1):.2f})"


def samples(run: Run) -> Section | None:
  """What the networks of the first seed write."""
  blocks = []
  for seed in run.results.get("seeds", ())[:1]:
    for network in NETWORKS:
      for prompt, written in seed.get(network, {}).get("samples", ()):
        blocks.append(el("h3", plain(network)))
        blocks.append(el("pre", el("b", prompt), written.rstrip()))
  return Section("What they write", join(blocks)) if blocks else None


def of_run(part: Section, run: Run, number: int) -> Section:
  """The same part under the run's name, and its pictures too."""
  made = [p._replace(name=f"{p.name}_{number + 1}") for p in part.pictures]
  return Section(f"{run.name}: {part.title.lower()}", part.body, made)
