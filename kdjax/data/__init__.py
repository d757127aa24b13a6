"""Images and labels: sources by name, and the batches made of them."""

from kdjax.data.augment import center_crop as center_crop
from kdjax.data.augment import crop_and_flip as crop_and_flip
from kdjax.data.augment import mixup as mixup
from kdjax.data.augment import random_resized_crop as random_resized_crop
from kdjax.data.named import blank as blank
from kdjax.data.named import load as load
from kdjax.data.pipeline import NORMALIZATION as NORMALIZATION
from kdjax.data.pipeline import eval_batches as eval_batches
from kdjax.data.pipeline import train_batches as train_batches
from kdjax.data.sources import Source as Source
from kdjax.data.sources import check_labels as check_labels
from kdjax.data.sources import from_arrays as from_arrays
from kdjax.data.sources import in_memory as in_memory
from kdjax.data.sources import labelled_mask as labelled_mask
from kdjax.data.sources import select as select
from kdjax.data.sources import subset as subset
from kdjax.data.sources import with_logits as with_logits
