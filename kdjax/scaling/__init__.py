"""What a config's distilled step takes on devices that are not here."""

from kdjax.scaling.command import main as main
from kdjax.scaling.devices import described as described
from kdjax.scaling.devices import simulated as simulated
from kdjax.scaling.figures import Figures as Figures
from kdjax.scaling.figures import measure as measure
from kdjax.scaling.tables import content as content
from kdjax.scaling.tables import grouped as grouped
from kdjax.scaling.tables import table as table
