"""What a config describes: its data, networks and phases, run for a seed.

Everything that can be checked is, before anything trains.
"""

from typing import Any

from kdjax import errors
from kdjax.experiment.images import ImageExperiment
from kdjax.experiment.phases import run
from kdjax.experiment.texts import TextExperiment

__all__ = ["ImageExperiment", "TextExperiment", "experiment", "run"]


def experiment(
  config: Any, *, blank: bool = False
) -> ImageExperiment | TextExperiment:
  """The experiment of the config's task, everything checked that can be.

  Args:
    config: the whole.
    blank: from sizes alone, without data and weights: its `parts` are all that
      is of use.
  """
  tasks = {"image": ImageExperiment, "text": TextExperiment}
  return errors.choose("task", config.task, tasks)(config, blank=blank)
