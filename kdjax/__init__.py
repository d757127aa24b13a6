"""Knowledge distillation in JAX: a small student from a large teacher.

    total = alpha · hard + (1 − alpha) · T² · soft

alpha weights the labels, 1 − alpha the teacher, whose logits and the student's
are both divided by the temperature T in the soft loss.
"""

from kdjax import losses as losses
from kdjax import models as models
from kdjax.adapters import cast as cast
from kdjax.adapters import from_batch as from_batch
from kdjax.adapters import from_linen as from_linen
from kdjax.adapters import from_nnx as from_nnx
from kdjax.errors import UserError as UserError
from kdjax.evaluate import make_evaluate as make_evaluate
from kdjax.loop import distill as distill
from kdjax.objective import Objective as Objective
from kdjax.objective import Term as Term
from kdjax.objective import hinton as hinton
from kdjax.train_state import init_state as init_state
from kdjax.train_step import jit_step as jit_step
from kdjax.train_step import make_train_step as make_train_step
from kdjax.train_step import pmap_step as pmap_step
from kdjax.types import Batch as Batch
from kdjax.types import Model as Model
from kdjax.types import Output as Output
from kdjax.types import TrainState as TrainState

__version__ = "0.1.0.dev0"
