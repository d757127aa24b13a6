"""`python -m kdjax`, the help of its commands, and mistakes in one line."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kdjax
from kdjax import __main__ as top
from kdjax import commands, errors, launch, train
from kdjax.export import command as export
from kdjax.report import command as report
from kdjax.scaling import command as scaling

ROOT = Path(__file__).parents[1]
MAINS = {
  "train": train,
  "launch": launch,
  "scaling": scaling,
  "export": export,
  "report": report,
}
DIGITS = f"--config={ROOT}/configs/digits.py:smoke"


def test_the_commands_are_listed(capsys):
  assert top.main(["kdjax"]) == 2
  assert top.main(["kdjax", "--help"]) == 0
  shown = capsys.readouterr().out
  for name in MAINS:
    assert shown.count(f"\n  {name}") == 2


def test_every_command_exists():
  assert set(MAINS) == set(top.COMMANDS)
  for module, _ in top.COMMANDS.values():
    assert importlib.util.find_spec(module) is not None


def test_a_command_is_what_python_runs(capsys):
  assert top.main(["kdjax", "launch", "--help"]) == 0
  assert capsys.readouterr().out.strip() == launch.__doc__.strip()
  assert top.main(["kdjax", "launch", "--processes=2"]) == 2
  assert "nothing to launch" in capsys.readouterr().err


def test_an_unknown_command_is_told_with_the_nearest(capsys):
  assert top.main(["kdjax", "trian", "--workdir=x"]) == 2
  said = capsys.readouterr().err
  assert said.startswith("kdjax: unknown command 'trian': did you mean 'train'")
  assert said.count("\n") == 1


def test_the_versions_are_told_in_one_line(capsys):
  assert top.main(["kdjax", "--version"]) == 0
  told = capsys.readouterr().out
  assert told.startswith(f"kdjax {kdjax.__version__}, python 3.")
  assert re.search(r", jax \d+\.\d+", told)
  assert told.count("\n") == 1


def test_the_console_script_is_this_main():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  module, function = project["scripts"]["kdjax"].split(":")
  assert getattr(importlib.import_module(module), function) is top.main


@pytest.mark.parametrize(
  ("raised", "code", "says"),
  [
    (errors.UserError("got x"), 2, "kdjax: got x\n"),
    (KeyboardInterrupt(), 130, "kdjax: stopped\n"),
  ],
)
def test_exit_codes(raised, code, says, capsys):
  def body():
    raise raised

  assert commands.run(["kdjax", "x"], "help", body) == code
  assert capsys.readouterr().err == says


@pytest.mark.slow
def test_from_the_shell():
  """The code that a shell sees; `-m kdjax train` is `-m kdjax.train`."""

  def shell(*arguments):
    return subprocess.run(
      [sys.executable, "-m", *arguments],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )

  one, other = shell("kdjax", "train", "--help"), shell("kdjax.train", "--help")
  assert one.returncode == other.returncode == 0
  assert one.stdout == other.stdout != ""
  mistake = shell("kdjax", "train", DIGITS)
  assert mistake.returncode == 2
  assert mistake.stderr == "kdjax: --workdir is missing: see --help\n"


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("train", "--config and --workdir are missing: see --help"),
    ("launch", "nothing to launch: put kdjax.train's arguments after --"),
    ("scaling", "--config is missing: see --help"),
    ("export", "--workdir and --output are missing: see --help"),
    ("report", "got no folder: name the --workdir of a run"),
  ],
)
def test_without_arguments_it_says_what_is_missing(name, says, capsys):
  assert MAINS[name].main([name]) == 2
  told = capsys.readouterr()
  assert told.out.strip() == MAINS[name].__doc__.strip()
  assert told.err.startswith(f"kdjax: {says}")
  assert told.err.count("\n") == 1


def test_without_a_command_it_names_them(capsys):
  assert top.main(["kdjax"]) == 2
  said = capsys.readouterr().err
  assert said.startswith("kdjax: got no command: name one of train, report,")


@pytest.mark.parametrize("name", MAINS)
def test_help_reads_well(name, capsys):
  main = MAINS[name].main
  assert main([name, "--help"]) == 0
  assert main([name, "-h"]) == 0
  shown = capsys.readouterr().out
  text = shown[: len(shown) // 2]
  assert shown == text * 2
  lines = text.splitlines()
  assert max(map(len, lines)) <= 80
  assert lines[0].endswith(".")
  assert f"    python -m kdjax.{name} " in text
  assert "\n  --help " in text
  assert "Exit codes: " in text


@pytest.mark.parametrize("name", MAINS)
def test_help_has_every_flag(name, monkeypatch):
  """What the command defines is what it documents."""
  defined = set()

  def parse(argv, define):
    values = commands.flags.FlagValues()
    before = set(values)
    define(values)
    defined.update(set(values) - before)
    raise errors.UserError("enough")

  monkeypatch.setattr(commands, "parse", parse)
  assert MAINS[name].main([name, DIGITS, "--", "x"]) == 2
  told = re.findall(r"^  --([a-z_]+)", MAINS[name].__doc__, re.MULTILINE)
  assert {"help", *defined} == set(told)


CONFIGS = {
  "syntax": "def get_config():\n  return {{\n",
  "raises": "def get_config():\n  raise RuntimeError('two\\nlines')\n",
  "none": "def get_config():\n  return None\n",
  "empty": "def get_config():\n  return dict(seed=1)\n",
  "imports": "import not_there\n",
  "exits": "import sys\ndef get_config():\n  sys.exit('bye')\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  for name, text in CONFIGS.items():
    (tmp_path / f"{name}.py").write_text(text)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").write_text("")
  monkeypatch.chdir(tmp_path)
  return tmp_path


RUN = "--workdir=run"
MISTAKES = [
  ("train", [RUN], "--config is missing: see --help"),
  ("train", [DIGITS], "--workdir is missing: see --help"),
  ("train", [DIGITS, "--workdir="], "--workdir is missing: see --help"),
  ("train", ["--config=", RUN], "--config= is no file: give a config file"),
  ("train", ["--config=none_here.py", RUN], "--config=none_here.py is no file"),
  ("train", ["--config=full", RUN], "--config=full is a folder: give a config"),
  ("train", ["--config", "full", RUN], "--config=full is a folder"),
  ("train", ["--config=syntax.py", RUN], "'{' was never closed (syntax.py, l"),
  (
    "train",
    ["--config=raises.py", RUN],
    "RuntimeError: two; lines (raises.py, line 2)",
  ),
  ("train", ["--config=none.py", RUN], "returns None, no ConfigDict"),
  ("train", ["--config=empty.py", RUN], "config.task is missing: add it to"),
  ("train", ["--config=imports.py", RUN], "not_there' (imports.py, line 1)"),
  ("train", ["--config=exits.py", RUN], "SystemExit: bye ("),
  ("train", [DIGITS, RUN, "extra"], "got extra: see --help"),
  ("train", [DIGITS, RUN, "--wrkdir=x"], "'wrkdir'. Did you mean: workdir"),
  (
    "train",
    [DIGITS, RUN, "--config.alhpa=1"],
    "the config has no key 'alhpa'; Did you mean \"alpha\"",
  ),
  (
    "train",
    [DIGITS, RUN, "--config.phases.alnoe.steps=1"],
    "the config has no key 'alnoe'; Did you mean \"alone\"",
  ),
  (
    "train",
    [DIGITS, RUN, "--config.alpha=x"],
    "--config.alpha is 'x', must be a number",
  ),
  (
    "train",
    [DIGITS, RUN, "--config.temperature=4.0"],
    "has keys of its own: change those, as in --config.temperature.NAME=",
  ),
  ("train", [DIGITS, RUN, "--seeds=5"], "a key of the config is --config."),
  ("train", ["configs/digits.py", RUN], "give it as --config=configs/digits"),
  (
    "train",
    [f"--config={ROOT}/configs/digits.py:smok", RUN],
    "unknown word after the colon of --config 'smok': did you mean 'smoke'",
  ),
  (
    "train",
    [DIGITS, RUN, "--config.seeds=1.5"],
    "--config.seeds is '1.5', must be a whole",
  ),
  (
    "train",
    [DIGITS, RUN, "--config.seeds=0"],
    "seeds is 0, must be at least",
  ),
  ("train", [DIGITS, RUN, "--config.data.flip=x"], "flag --config.data.flip=x"),
  (
    "train",
    [f"--config={ROOT}/configs/cifar100/pair.py:foo", RUN],
    "got the pair 'foo', needs TEACHER-STUDENT",
  ),
  ("train", [DIGITS, "--workdir=s3://b/run"], "of buckets only gs://... can"),
  ("train", [DIGITS, RUN, "--processes=2"], "give all three or none"),
  ("train", [DIGITS, RUN, "--process=1"], "give all three or none"),
  (
    "train",
    [DIGITS, RUN, "--processes=two"],
    "--processes is 'two', must be a whole",
  ),
  (
    "train",
    [DIGITS, RUN, "--coordinator=here", "--processes=2", "--process=0"],
    "got coordinator=here, needs host:port",
  ),
  (
    "train",
    [DIGITS, RUN, "--coordinator=a:1", "--processes=2", "--process=2"],
    "processes are numbered from 0 to 1",
  ),
  ("train", [DIGITS, RUN, "--start_seconds=0"], "is not number >= 1.0"),
  ("train", [DIGITS, RUN, "--logger=x"], "must be MODULE:NAME, such as"),
  (
    "train",
    [DIGITS, RUN, "--logger=not_there:x"],
    "or be on PYTHONPATH",
  ),
  ("launch", ["--processes=2"], "put kdjax.train's arguments after --, such"),
  ("launch", ["--processes=2", DIGITS], "put kdjax.train's arguments after --"),
  ("launch", ["--", DIGITS], "--processes is missing: see --help"),
  ("launch", ["--processes=0", "--", DIGITS], "0 is not a positive integer"),
  ("launch", ["--proceses=2", "--", DIGITS], "Did you mean: processes"),
  ("launch", ["2", "--", DIGITS], "got 2: see --help"),
  ("scaling", ["--devices=2"], "--config is missing: see --help"),
  ("scaling", [DIGITS], "got --topology=None, --devices=None: give one of"),
  ("scaling", [DIGITS, "--devices=0"], "0 is not a positive integer"),
  (
    "scaling",
    [DIGITS, "--devices=1", "--json=not/there.json"],
    "cannot write --json=not/there.json: name a file in a folder that exists",
  ),
  ("export", ["--output=x"], "--workdir is missing: see --help"),
  ("export", ["--workdir=x"], "--output is missing: see --help"),
  ("export", ["--workdir=x", "--output=y"], "x is no folder: give the --workd"),
  ("export", ["--workdir=full", "--output=y"], "full has no config.json: give"),
  ("export", ["--workdir=x", "--output=full"], "full exists and is not empty"),
  (
    "export",
    ["--workdir=x", "--output=y", "--seed=a"],
    "--seed is 'a', must be a",
  ),
  (
    "export",
    ["--workdir=x", "--output=y", "--network=student"],
    "unknown network 'student': did you mean 'student_alone'",
  ),
  (
    "export",
    ["--workdir=x", "--output=y", "--format=pt"],
    "format 'pt': ",
  ),
  ("export", ["--workdir=x", "--output=y", "z"], "got z: see --help"),
  ("report", ["--theme=dark", "x"], "flag 'theme': see --help\n"),
  ("train", [DIGITS, "--workdir=/proc/x"], "cannot write into /proc"),
]


@pytest.mark.parametrize(
  ("name", "arguments", "says"),
  MISTAKES,
  ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_one_line_and_leaves_nothing(
  name, arguments, says, folder, capsys
):
  before = sorted(folder.rglob("*"))
  assert MAINS[name].main([name, *arguments]) == 2
  out, said = capsys.readouterr()
  assert says in said
  assert said.startswith("kdjax: ")
  assert said.count("\n") == 1
  assert out == ""
  left = [p for p in folder.rglob("*") if "__pycache__" not in p.parts]
  assert sorted(left) == before
