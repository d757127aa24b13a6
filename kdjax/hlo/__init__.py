"""What a compiled program says of itself: loops, collectives, memory traffic.

Read from the text of `compiled.as_text()`, one device of many. XLA's own
count takes the body of a loop once; here each instruction counts as often as
the loops around it run.
"""

from kdjax.hlo.collectives import KINDS as KINDS
from kdjax.hlo.collectives import Collective as Collective
from kdjax.hlo.program import Program as Program
from kdjax.hlo.text import Array as Array
from kdjax.hlo.text import Instruction as Instruction
