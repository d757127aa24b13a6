"""Several processes, one run: how they find each other, agree, and end.

`initialize` is called first of all, by every process of a run, within `run`.
Alone, on a laptop or any single machine, it does nothing.
"""

from kdjax.processes.agreement import code as code
from kdjax.processes.agreement import versions as versions
from kdjax.processes.crew import alone as alone
from kdjax.processes.crew import initialize as initialize
from kdjax.processes.crew import lead as lead
from kdjax.processes.crew import run as run
from kdjax.processes.crew import wait_for_all as wait_for_all
from kdjax.processes.gather import gather as gather
from kdjax.processes.gather import of_first as of_first
from kdjax.processes.meeting import AbsentError as AbsentError
from kdjax.processes.place import Place as Place
from kdjax.processes.place import find as find
