"""The texts: their Python runs, their commands parse, what they name exists."""

import importlib
import inspect
import json
import re
import shlex
import statistics
import tomllib
from pathlib import Path

import pytest

from kdjax import config, losses, parallel, results, terms, train

ROOT = Path(__file__).parents[1]
READMES = ["README.md", "README.zh.md"]
TEXTS = [
  *READMES,
  "CHANGELOG.md",
  "CONTRIBUTING.md",
  *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))),
]
RUN = "python -m kdjax.train "
# Where the text of each command's --help is.
HELP = {
  "train": "kdjax.train",
  "launch": "kdjax.launch",
  "export": "kdjax.export.command",
  "report": "kdjax.report.command",
  "scaling": "kdjax.scaling.command",
}


def read(name):
  return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, language):
  """(line, text) of each fenced block of a language."""
  # Every block is matched, so that no closing fence counts as an opening one.
  found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
  return [
    (text[: m.start(2)].count("\n"), m[2]) for m in found if m[1] == language
  ]


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
  # Eight devices compile longer, and other tests split the same step.
  mesh = parallel.make_mesh(1)
  monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh)
  examples = blocks(read("README.md"), "python")
  assert examples
  names = {"__name__": "readme"}  # later blocks use the names of earlier ones
  for line, code in examples:
    # Errors then point into the text.
    exec(compile("\n" * line + code, "README.md", "exec"), names)
  # What the reader is shown is what the example is for.
  alone, distilled = map(float, capsys.readouterr().out.split()[:2])
  assert distilled > alone + 0.02
  assert distilled > 0.82


def test_the_first_example_has_the_length_that_is_promised():
  """About 20 lines: what a reader takes in at a glance."""
  first = blocks(read("README.md"), "python")[0][1].splitlines()
  assert sum(bool(x.split("#")[0].strip()) for x in first) <= 22


def test_the_translation_has_the_first_example_alone():
  """So that it runs if that of README.md does."""
  first = blocks(read("README.md"), "python")[0][1]
  ((_, translated),) = blocks(read("README.zh.md"), "python")
  comment = re.compile(r"#.*")
  assert comment.sub("", translated) == comment.sub("", first)


def rows_of(heading):
  """The rows of README.md's table whose first heading it is, by column."""
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    # No-break spaces keep its cells on one line.
    for line in read("README.md").replace("\xa0", " ").splitlines()
    if line.startswith("|")
  ]
  head = next(row for row in rows if row[0] == heading)
  first = rows.index(head) + 2
  found = []
  for row in rows[first:]:
    if not row[0].startswith("`"):
      break  # the next table
    assert len(row) == len(head), row
    found.append(dict(zip(head, row)))
  names = [row[heading] for row in found]
  assert len(set(names)) == len(names)
  return found


def test_table_has_losses_that_exist_with_their_power_of_t():
  # Not every loss must be in it: a new one touches three files.
  told = {r["loss"].strip("`"): int(r["power"]) for r in rows_of("loss")}
  assert len(told) >= 18
  assert told == {
    name: losses.traits(losses.LOGIT_LOSSES[name]).power for name in told
  }


def test_the_table_of_activation_losses_names_those_that_exist():
  told = [r["activation loss"] for r in rows_of("activation loss")]
  plain = {t.strip("` *") for t in told if not t.endswith("*")}
  owning = {t.strip("` *") for t in told if t.endswith("*")}
  assert len(told) >= 22  # a new one touches three files
  assert owning <= set(terms.TERMS)
  assert plain <= set(losses.TAP_LOSSES) - set(terms.TERMS)


def lines():
  """(text, line) of all commands; a variable of the shell counts as 1."""
  return [
    (name, re.sub(r"\$\w+", "1", line))
    for name in TEXTS
    for _, block in blocks(read(name), "")
    for line in block.replace("\\\n", " ").splitlines()
  ]


def test_what_losses_gained_is_what_was_measured():
  pages = [
    json.loads(read(f"docs/results/{name}.json"))["rows"]
    for name in ("digits_logits", "digits")
  ]
  measured = pages[0] | pages[1]  # of both, the page of all methods
  rows = [*rows_of("loss"), *rows_of("activation loss")]
  for row in rows:
    name = next(iter(row.values())).strip("` *")
    told = row["digits %"]
    if name not in measured:
      assert told == "–", name
      continue
    values = [100 * x for x in measured[name]["accuracy"]]
    error = statistics.stdev(values) / len(values) ** 0.5
    assert told == f"{statistics.fmean(values):.1f} ± {error:.1f}", name


def test_the_first_table_is_that_of_its_file():
  measured = json.loads(read("docs/results/main.json"))
  shown = read("docs/benchmarks.md").split("<!-- digits table -->\n```\n")[1]
  assert shown.split("```")[0].rstrip() == results.table(measured)
  gain = measured["gain"]["accuracy"]
  told = f"{100 * gain['mean']:.2f} ± {100 * gain['stderr']:.2f} points"
  for name in ("README.md", "docs/index.md"):
    assert f"istillation gains {told}" in " ".join(read(name).split()), name


def test_what_is_said_of_code_lm_is_what_was_measured():
  found = json.loads(read("docs/results/code_lm.json"))
  page = read("docs/results/code_lm.md")
  _, table, samples = re.findall("```\n(.*?)\n```", page, re.S)
  assert f"{table}\n\n{samples}" == results.table(found).rstrip()
  gain, of = found["gain"]["bits_per_byte"], "{:.3f} ± {:.3f}"
  told = of.format(-gain["mean"], gain["stderr"])
  for n, words in zip(results.NETWORKS[1:], ("alone", "distilled")):
    told += f"|{found[n]['bits_per_byte']:.3f} {words}"
  told += f"|{found['teacher']['bits_per_byte']:.3f} the teacher"
  assert all(words in read("README.md") for words in told.split("|"))
  first = [found["seeds"][0][n]["bits_per_byte"] for n in results.NETWORKS]
  assert (
    "{:.2f} bits per byte for the teacher, {:.2f} for the student alone and "
    "{:.2f} distilled".format(*first)
    in read("docs/tutorials/language.md")
  )


def commands():
  return [
    (name, line[line.index(RUN) :].split("#")[0].strip())
    for name, line in lines()
    if RUN in line
  ] + [
    (name, f"{RUN}{line.split(' -- ')[1]}")
    for name, line in lines()
    if "python -m kdjax.launch " in line and " -- " in line
  ]


@pytest.mark.parametrize(("name", "command"), commands())
def test_commands_name_configs_and_keys_that_exist(name, command, monkeypatch):
  monkeypatch.chdir(ROOT)
  arguments = shlex.split(command.removeprefix("python -m "))
  given = train._arguments(arguments)
  assert given.workdir.startswith(("runs/", "gs://BUCKET/"))
  config.check_keys(given.config)
  config.goal(given.config)


def test_commands_have_flags_that_exist():
  found = set()
  for name, line in lines():
    for module, rest in re.findall(r"python -m kdjax\.(\w+) ([^#]*)", line):
      help_text = inspect.getdoc(importlib.import_module(HELP[module])) or ""
      for flag in re.findall(r"(?<!\S)--([a-z_]+)=", rest.split(" -- ")[0]):
        assert f"--{flag}" in help_text, (name, line)
        found.add((module, flag))
  assert {("export", "format"), ("scaling", "topology")} <= found


def test_the_two_first_commands():
  for name in READMES:
    _, first = blocks(read(name), "")[0]
    lines = [line.split("#")[0].rstrip() for line in first.splitlines()]
    assert lines == [
      f"pip install -e . && {RUN}"
      "--config=configs/digits.py --workdir=runs/digits",
      "pip install -e '.[test]' && pytest",
    ]


def test_extras_exist():
  project = tomllib.loads(read("pyproject.toml"))["project"]
  named = {
    e for name in TEXTS for e in re.findall(r"'\.\[(\w+)\]'", read(name))
  }
  assert {"test", "dev", "tpu", "cuda"} <= named
  assert named <= set(project["optional-dependencies"])


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_files_named_exist(name):
  text = read(name)
  links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
  near = [x for x in links if not re.match(r"\w+:", x)]
  missing = [x for x in near if not ((ROOT / name).parent / x).exists()]
  top = r"(?:kdjax|configs|tests|docs|benchmarks|\.ci)"
  prose = re.sub(r"\]\(.*?\)", "]", text)
  named = re.findall(rf"(?<![\w/.]){top}/[\w./-]*\w", prose)
  named += re.findall(r"`([\w.]+\.(?:md|toml))`", text)
  missing += [x for x in named if not (ROOT / x).exists()]
  assert not missing
