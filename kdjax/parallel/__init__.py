"""Devices: the mesh, what lies where on it, the rows of a process."""

from kdjax.parallel.gathered import gathered as gathered
from kdjax.parallel.mesh import AXES as AXES
from kdjax.parallel.mesh import batch_axes as batch_axes
from kdjax.parallel.mesh import batch_parts as batch_parts
from kdjax.parallel.mesh import batch_sharding as batch_sharding
from kdjax.parallel.mesh import check_batch_size as check_batch_size
from kdjax.parallel.mesh import create as create
from kdjax.parallel.mesh import data_share as data_share
from kdjax.parallel.mesh import make_mesh as make_mesh
from kdjax.parallel.mesh import on_host as on_host
from kdjax.parallel.mesh import place as place
from kdjax.parallel.mesh import put as put
from kdjax.parallel.mesh import put_batch as put_batch
from kdjax.parallel.mesh import replicated as replicated
from kdjax.parallel.mesh import slice_of as slice_of
from kdjax.parallel.partition import Rule as Rule
from kdjax.parallel.partition import check_rules as check_rules
from kdjax.parallel.partition import shardings as shardings
from kdjax.parallel.partition import table as table
from kdjax.parallel.partition import unsplit as unsplit
from kdjax.parallel.pmap import pmap_first as pmap_first
from kdjax.parallel.pmap import pmap_replicate as pmap_replicate
from kdjax.parallel.pmap import pmap_split as pmap_split
