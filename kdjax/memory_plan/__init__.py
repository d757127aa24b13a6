"""What a step takes of each device's memory, before the first one runs.

The arrays that go in are counted by their shardings, the rest is what the
compiled step says of itself. Nothing is executed.
"""

from kdjax.memory_plan.head import head_bytes as head_bytes
from kdjax.memory_plan.measured import Plan as Plan
from kdjax.memory_plan.measured import plan as plan
from kdjax.memory_plan.measured import read as read
from kdjax.memory_plan.words import advice as advice
from kdjax.memory_plan.words import check_fits as check_fits
from kdjax.memory_plan.words import line as line
from kdjax.memory_plan.words import readable as readable
from kdjax.memory_plan.words import table as table
