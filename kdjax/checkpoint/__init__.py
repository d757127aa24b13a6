"""Saves and resumes a run: train state, input position and facts, on Orbax.

The teacher is never stored; its `fingerprint` belongs in the facts.
"""

from kdjax.checkpoint.arrays import fingerprint as fingerprint
from kdjax.checkpoint.folder import Checkpointer as Checkpointer
from kdjax.checkpoint.newest import Restored as Restored
from kdjax.checkpoint.newest import load_params as load_params
from kdjax.checkpoint.newest import restore as restore
from kdjax.checkpoint.newest import steps as steps
