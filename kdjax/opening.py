"""How a phase begins: what lies where, and what is said of it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from kdjax import errors, flops, losses, memory_plan, parallel
from kdjax.evaluate import num_parameters
from kdjax.objective import Objective, Term, as_objective, hinton
from kdjax.preflight import check_outputs
from kdjax.train_state import StudentOf, TeacherOf, create_state
from kdjax.types import Batch, Model, TrainState


class Placed(NamedTuple):
  """The networks of a phase and their variables, on the mesh.

  Attributes:
    student, teacher: as they are applied there.
    frozen: what no step changes.
    shardings: of the state.
    state: the shapes of it; the arrays are the caller's, to be donated.
    theirs: the shapes of the teacher's variables.
    params: the shapes of what the student is applied with.
  """

  student: Model
  teacher: Model | None
  frozen: PyTree
  shardings: TrainState
  state: TrainState
  theirs: Any
  params: PyTree

  def head(
    self, goal: Objective, rows: Batch, **of_step: Any
  ) -> Callable[[], int]:
    """A function that says what the head takes, by another compilation."""
    return functools.partial(
      memory_plan.head_bytes,
      self.student,
      self.teacher,
      goal,
      self.state.replace(params=self.params),
      self.theirs,
      rows,
      **of_step,
    )

  def flops(self, mesh: Mesh, rows: Batch) -> float | None:
    """Of a step; None where nobody knows what the device could do."""
    if not flops.peak(mesh.devices.flat[0].device_kind):
      return None
    variables = self.params, self.state.stats
    return flops.of_step(
      self.student, self.teacher, variables, self.theirs, rows
    )


def goal(
  terms: Objective | Sequence[Term] | None, teacher: Model | None
) -> Objective:
  """The terms, or what is minimised where none are given."""
  if terms is not None:
    return as_objective(terms)
  if teacher is not None:
    return hinton(alpha=0.1, temperature=4.0)
  return Objective((Term("hard", losses.cross_entropy, group="hard"),))


def given(variables: PyTree, teacher: Model, batch: Batch) -> PyTree:
  """A teacher's variables; one that has none needs none.

  Raises:
    UserError: it has some, and they are not given.
  """
  if not isinstance(variables, tuple) or variables:
    return variables
  needed = jax.eval_shape(teacher.init, jax.random.key(0), batch)
  if jax.tree.leaves(needed):
    raise errors.UserError(
      f"got no teacher_variables, and the teacher has "
      f"{num_parameters(needed[0]):,} parameters: give its (params, stats)"
    )
  return needed


def place(
  student: Model,
  teacher: Model | None,
  goal: Objective,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  teacher_variables: PyTree,
  *,
  seed: int,
  mesh: Mesh,
  partition: Sequence[parallel.Rule],
  teacher_partition: Sequence[parallel.Rule],
  variables: tuple[PyTree, PyTree] | None,
  teacher_of: TeacherOf,
  student_of: StudentOf,
) -> tuple[Placed, TrainState]:
  """Puts a phase's variables where they belong; arguments as of `distill`.

  Returns:
    What stays, and the state before the first update.

  Raises:
    UserError: rules that are none; networks that do not fit.
  """
  parallel.check_rules(partition, mesh, "partition")
  parallel.check_rules(teacher_partition, mesh, "teacher_partition")
  student = parallel.gathered(student, mesh, partition)
  if teacher is not None:
    teacher = parallel.gathered(teacher, mesh, teacher_partition)
  frozen = parallel.place(
    teacher_variables,
    parallel.shardings(teacher_variables, mesh, teacher_partition),
  )
  state, split = create_state(
    student,
    teacher,
    goal,
    optimizer,
    seed,
    batch,
    mesh=mesh,
    rules=partition,
    frozen=frozen,
    variables=variables,
    teacher_of=teacher_of,
    student_of=student_of,
  )
  # A teacher that is in the state is looked at as it begins.
  theirs = () if teacher is None else teacher_of(state, frozen)
  params = jax.eval_shape(student_of, state.params, frozen)
  check_outputs(
    student,
    teacher,
    (params, state.stats),
    theirs,
    batch,
    mesh=mesh,
    comparable=goal.comparable,
  )
  like, theirs = jax.eval_shape(lambda: (state, theirs))
  return Placed(student, teacher, frozen, split, like, theirs, params), state


def lies(state: TrainState, frozen: PyTree, *, table: bool) -> str:
  """What lies where; or, without a table, what lies whole and need not."""
  if table:
    return "\n" + parallel.table({"student": state, "teacher": frozen})
  return parallel.unsplit((state, frozen))


def describe(placed: Placed, mesh: Mesh, start: int, steps: int) -> str:
  """What is about to run, and where."""
  size = f"{num_parameters(placed.state.params):,} parameters"
  if jax.tree.leaves(placed.theirs):
    size += f", teacher of {num_parameters(placed.theirs[0]):,}"
  device = mesh.devices.flat[0]
  where = f"{mesh.size} {device.platform} device(s), {device.device_kind}"
  if start >= steps:
    return f"step {start} of {steps} is saved, nothing to train"
  at = f"from step {start} " if start else ""
  return (
    f"{at}to step {steps} on {where}; jax {jax.__version__} compiles "
    f"one train step: network of {size}"
  )


def memory(
  plan: memory_plan.Plan,
  head: Callable[[], int],
  settings: Mapping[str, Any],
) -> str:
  """What a step takes of each device: a line, or a table where it is much.

  Raises:
    UserError: the device has less.
  """
  if plan.limit is None or plan.total < plan.limit / 10:
    return memory_plan.line(plan)
  # To tell the head apart takes another compilation.
  plan = plan._replace(head=head())
  phase = settings.get("phase", "distilled")
  memory_plan.check_fits(plan, settings, phase=phase)
  return memory_plan.table(plan, settings, phase=phase)
