"""Loggers: told every number once, and closed however a run ends."""

import contextlib
import itertools
import json
import signal
import struct
import sys
import types

import jax
import networks
import numpy as np
import optax
import pytest

import kdjax
from kdjax import errors, loggers, parallel, preemption, processes
from kdjax.errors import UserError
from kdjax.experiment import phases
from kdjax.loop import DivergedError

MESH = parallel.make_mesh(1)
# One object, so that all tests share what is compiled.
STUDENT, OPTIMIZER = networks.bare(), optax.adam(1e-2)
TERMS = [kdjax.Term("hard", kdjax.losses.cross_entropy, group="hard")]
HELD_OUT = [networks.batch(16, seed=77)]


def batches(spoil_at=None, hook=None):
  for n in itertools.count():
    batch = networks.batch(16, seed=n)
    if n == spoil_at:
      batch["image"] = np.full_like(batch["image"], np.nan)
    if hook is not None:
      hook(n)
    yield batch


def run(on_metrics, train=None, **changes):
  arguments = dict(
    student=STUDENT,
    train=batches() if train is None else train,
    steps=4,
    save_every=2,
    mesh=MESH,
    quiet=True,
    terms=TERMS,
    optimizer=OPTIMIZER,
    evaluate_on=HELD_OUT,
    on_metrics=on_metrics,
  )
  return kdjax.distill(**(arguments | changes))


class Seen(list):
  """A callback that keeps what it is told."""

  def __call__(self, step, metrics):
    self.append((step, metrics))

  @property
  def steps(self):
    return [step for step, _ in self]


def logged(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_the_callback_is_told_what_is_written(tmp_path):
  seen = Seen()
  run(seen, folder=tmp_path)
  assert seen.steps == [1, 2, 2, 3, 4, 4]
  assert [{"step": s, **m} for s, m in seen] == logged(tmp_path)
  training, evaluation = seen[1][1], seen[2][1]
  assert {"loss/total", "loss/hard", "weight/hard"} <= set(training)
  assert set(evaluation) >= {"eval/nll", "eval/accuracy"}


def test_without_a_folder_too():
  seen = Seen()
  run(seen, steps=2, evaluate_on=None)
  assert seen.steps == [1, 2]


def test_what_a_callback_does_to_its_metrics_is_its_own(tmp_path):
  def spoil(step, metrics):
    metrics.clear()

  assert run(spoil).metrics == run(None).metrics


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path):
  run(None, steps=2, folder=tmp_path)
  seen = Seen()
  run(seen, folder=tmp_path)
  assert seen.steps == [3, 4, 4]


def test_other_processes_tell_nothing(monkeypatch):
  monkeypatch.setattr(processes, "lead", lambda: False)
  seen = Seen()
  run(seen, steps=2)
  assert seen == []


class Fails:
  """Raises at step 3."""

  def __call__(self, step, metrics):
    if step == 3:
      raise KeyError("no such\nchart")


def test_a_callback_that_raises_is_named_and_the_run_goes_on_from_here(
  tmp_path,
):
  with pytest.raises(UserError) as told:
    run(Fails(), folder=tmp_path / "a")
  said = str(told.value)
  assert "on_metrics, test_loggers.Fails, failed at step 3: KeyError" in said
  assert "(test_loggers.py, line " in said
  assert "\n" not in said
  assert isinstance(told.value.__cause__, KeyError)
  whole = run(None)
  again = run(None, folder=tmp_path / "a")
  ours, theirs = jax.device_get((again.state.params, whole.state.params))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert [line["step"] for line in logged(tmp_path / "a")] == [1, 2, 2, 3, 4, 4]


def recorder(events):
  """A logger that says when it is opened, told, and closed, and by what."""

  @contextlib.contextmanager
  def logger(folder, config):
    events.append(("open", folder.name, config["seed"]))
    try:
      yield lambda step, metrics: events.append(("told", step))
    except BaseException as error:
      events.append(("closed", type(error)))
      raise
    else:
      events.append(("closed", None))

  return logger


def ended(tmp_path, **changes):
  """How a logger was closed."""
  events = []
  folder = tmp_path / "student_alone"
  kind = contextlib.nullcontext()
  if "raises" in changes:
    kind = pytest.raises(changes.pop("raises"))
  with (
    kind,
    loggers.opened([recorder(events)], folder, {"seed": 5}) as on_metrics,
  ):
    run(on_metrics, folder=folder, **changes)
  assert events[0] == ("open", "student_alone", 5)
  assert [name for name, *_ in events].count("closed") == 1
  assert events[-1][0] == "closed"
  return events[-1][1]


def test_it_is_closed_after_the_run(tmp_path):
  assert ended(tmp_path) is None


def test_it_is_closed_after_a_loss_that_is_not_finite(tmp_path):
  broken = dict(train=batches(spoil_at=2), raises=DivergedError)
  assert ended(tmp_path, **broken) is DivergedError


def test_it_is_closed_after_sigterm(tmp_path):
  def hook(n):
    if n == 2:
      signal.raise_signal(signal.SIGTERM)

  stopped = dict(train=batches(hook=hook), raises=preemption.Preempted)
  assert ended(tmp_path, **stopped) is preemption.Preempted


def test_all_are_closed_if_one_fails(tmp_path):
  events = []

  @contextlib.contextmanager
  def fails(folder, config):
    yield Fails()

  with (
    pytest.raises(UserError, match=r"on_metrics, test_loggers.*fails, failed"),
    loggers.opened([recorder(events), fails], tmp_path, {"seed": 0}) as told,
  ):
    told(3, {})
  assert events[1:] == [("told", 3), ("closed", UserError)]


def test_what_one_does_to_its_metrics_the_next_does_not_see(tmp_path):
  @contextlib.contextmanager
  def spoils(folder, config):
    yield lambda step, metrics: metrics.clear()

  seen = Seen()
  keeps = lambda folder, config: contextlib.nullcontext(seen)  # noqa: E731
  with loggers.opened([spoils, keeps], tmp_path, {}) as on_metrics:
    on_metrics(1, {"loss/total": 2.0})
  assert seen == [(1, {"loss/total": 2.0})]


def test_one_that_cannot_be_opened_closes_those_before_it(tmp_path):
  events = []

  def fails(folder, config):
    raise OSError("no network")

  opens = [recorder(events), fails]
  with (
    pytest.raises(UserError, match=r"fails could not be opened: OSError: no n"),
    loggers.opened(opens, tmp_path, {"seed": 0}),
  ):
    pass
  assert events[-1][0] == "closed"


def test_a_function_that_is_no_context_manager_is_refused(tmp_path):
  with (
    pytest.raises(UserError, match="could not be opened: TypeError"),
    loggers.opened([lambda folder, config: None], tmp_path, {}),
  ):
    pass


def test_none_is_opened_on_other_processes(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "lead", lambda: False)
  with loggers.opened([recorder([])], tmp_path, {"seed": 0}) as on_metrics:
    assert on_metrics is None


class Experiment:
  """As `phases.run` needs it; its phases take no time."""

  loaded = None

  def __init__(self):
    steps = {"teacher": 4, "alone": 4, "distilled": 0}
    self.config = kdjax_config(steps)

  def train(self, phase, folder, seed, frozen, on_metrics, *, finished):
    if on_metrics is not None:
      on_metrics(1, {})
    return {}, {}

  def stored(self, variables):
    return variables

  def measure(self, phase, variables, frozen, signs):
    return {}, {}


def kdjax_config(steps):
  from ml_collections import ConfigDict

  phases_of = {name: {"steps": n} for name, n in steps.items()}
  return ConfigDict({"seed": 3, "phases": phases_of, "hang_minutes": 7.0})


def test_what_is_measured_between_phases_is_watched(tmp_path, monkeypatch):
  made, seen = [], []

  class Watchdog(phases.Watchdog):
    def __init__(self, clock, note, *, hang_minutes):
      super().__init__(clock, note, hang_minutes=hang_minutes)
      made.append((clock, hang_minutes))

  class Measured(Experiment):
    def measure(self, phase, variables, frozen, signs):
      clock, minutes = made[-1]
      assert signs == clock.signs
      seen.append((phase, clock.doing, minutes))
      return {}, {}

  monkeypatch.setattr(phases, "Watchdog", Watchdog)
  phases.run(Measured(), tmp_path, 3)
  assert seen == [
    ("teacher", "evaluation", 7.0),
    ("alone", "evaluation", 7.0),
  ]


def test_every_phase_that_trains_has_its_own(tmp_path):
  events = []
  phases.run(Experiment(), tmp_path, 3, [recorder(events)])
  opened = [("open", "teacher", 3), ("open", "student_alone", 3)]
  assert [event for event in events if event[0] == "open"] == opened
  # Of a finished phase there is nothing to tell.
  (tmp_path / "teacher" / "checkpoints" / "4").mkdir(parents=True)
  events.clear()
  phases.run(Experiment(), tmp_path, 3, [recorder(events)])
  assert [e for e in events if e[0] == "open"] == opened[1:]


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("mine", "--logger is 'mine', must be MODULE:NAME"),
    ("not_there:f", "cannot import --logger not_there:f: ModuleNotFoundError"),
    ("contextlib:supress", "unknown logger of contextlib 'supress': did you"),
  ],
)
def test_a_logger_that_does_not_exist_is_told(name, says):
  with pytest.raises(UserError) as told:
    loggers.named(name)
  assert says in str(told.value)


def test_the_line_that_is_named_is_the_users_own():
  def fails(step, metrics):
    json.loads("{")

  with pytest.raises(UserError, match=r"JSONDecodeError.*\(test_loggers.py, l"):
    loggers.guarded(fails)(1, {})


def test_a_logger_by_its_name():
  assert loggers.named("contextlib:suppress") is contextlib.suppress


def killed(on_metrics):
  """The same, which ends the run at step 4, before that is saved."""

  def call(step, metrics):
    on_metrics(step, metrics)
    if step == 4:
      raise OSError

  return call


class FakeRun:
  """What is used of a run of W&B; `server` is the last step it has."""

  def __init__(self, step):
    self.step, self.logged, self.ended = step, [], []

  def log(self, metrics, step):
    assert step >= self.step  # else W&B leaves it out, with a warning
    self.step = step
    self.logged.append((step, metrics))

  def finish(self, exit_code=0):
    self.ended.append(exit_code)


@pytest.fixture
def fake(monkeypatch):
  made = []

  def init(**arguments):
    made.append((arguments, FakeRun(fake_module.server_step)))
    return made[-1][1]

  fake_module = types.ModuleType("wandb")
  fake_module.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore
  fake_module.init, fake_module.server_step = init, 0
  fake_module.Settings = dict
  fake_module.made = made
  monkeypatch.setitem(sys.modules, "wandb", fake_module)
  return fake_module


def test_wandb_continues_its_run_and_no_step_goes_back(tmp_path, fake):
  folder = tmp_path / "digits" / "seed_1" / "student_alone"
  logger = loggers.wandb("project")
  opened = logger(folder, {"seed": 1})
  with pytest.raises(UserError), opened as on_metrics:
    run(killed(on_metrics), folder=folder)
  with logger(folder, {"seed": 1}) as on_metrics:
    run(on_metrics, folder=folder)
  (first, before), (second, after) = fake.made
  assert first == second
  assert first["resume"] == "allow"
  assert first["project"] == "project"
  assert first["name"] == "digits/seed_1/student_alone"
  assert first["group"] == "digits"
  assert first["job_type"] == "student_alone"
  assert first["config"] == {"seed": 1}
  assert [step for step, _ in before.logged] == [1, 2, 2, 3, 4]
  # Step 3 is not sent again; 4 is, as its evaluation may be missing.
  assert [step for step, _ in after.logged] == [4, 4]
  assert "eval/nll" in after.logged[-1][1]
  assert (before.ended, after.ended) == ([1], [0])


def test_wandb_is_not_told_what_its_server_has(tmp_path, fake):
  fake.server_step = 4
  folder = tmp_path / "digits" / "seed_1" / "student_alone"
  with loggers.wandb("project")(folder, {}) as on_metrics:
    for step in range(1, 6):
      on_metrics(step, {})
  assert [step for step, _ in fake.made[0][1].logged] == [4, 5]


def test_each_phase_has_its_own_run(tmp_path, fake):
  for name in ("teacher", "student_alone"):
    with loggers.wandb("project")(tmp_path / "seed_0" / name, {}):
      pass
  ids = {arguments["id"] for arguments, _ in fake.made}
  assert len(ids) == 2


def test_a_missing_package_is_told_in_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(errors.UserError, match=r"pip install 'kdjax\[wandb\]'"):
    loggers.wandb("project")


def records(path):
  """Those of a file of W&B: LevelDB's log format after a header of 7 bytes."""
  data, at, record = path.read_bytes(), 7, b""
  while at < len(data):
    if 32768 - at % 32768 < 7:  # no room for a head: the block is padded
      at += 32768 - at % 32768
      continue
    _, size, kind = struct.unpack("<IHB", data[at : at + 7])
    record += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or the last part
      yield record
      record = b""


@pytest.mark.slow
def test_the_real_wandb_offline(tmp_path, monkeypatch, capfd):
  """Its own file of each start holds what was sent, and the same id."""
  wandb = pytest.importorskip("wandb")  # the extra; .ci/run installs it
  from wandb.proto.wandb_internal_pb2 import Record

  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  folder = tmp_path / "digits" / "seed_0" / "student_alone"
  logger = loggers.wandb("project")
  opened = logger(folder, {"seed": 0})
  with pytest.raises(UserError), opened as on_metrics:
    run(killed(on_metrics), folder=folder)
  assert capfd.readouterr().err == ""
  with logger(folder, {"seed": 0}) as on_metrics:
    run(on_metrics, folder=folder)

  wandb.teardown()  # until then its files may not be whole

  def read(path):
    rows, run_of, code = {}, None, None
    for data in records(path):
      record = Record.FromString(data)
      if record.HasField("run"):
        run_of = record.run
      if record.HasField("exit"):
        code = record.exit.exit_code
      if record.HasField("history"):
        items = {
          "/".join(i.nested_key) or i.key: json.loads(i.value_json)
          for i in record.history.item
        }
        rows[items["_step"]] = items
    return run_of, rows, code

  # Their names begin with the time of the start, in whole seconds.
  found = [read(path) for path in folder.glob("wandb/offline-run-*/*.wandb")]
  found.sort(key=lambda it: it[2], reverse=True)
  (first, before, failed), (second, after, done) = found
  assert first.run_id == second.run_id
  assert first.project == "project"
  assert first.run_group == "digits"
  assert first.job_type == "student_alone"
  assert (failed, done) == (1, 0)
  assert sorted(before) == [1, 2, 3, 4]
  assert sorted(after) == [4]
  lines = [line for line in logged(folder) if line["step"] == 4]
  for line in lines:
    for name, value in line.items():
      if name != "step":
        assert after[4][name] == value
