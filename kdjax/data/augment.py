"""Images -> images: per example on the host, and mixup on the device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, UInt8

from kdjax.types import Batch, UserError

Image = UInt8[np.ndarray, "_ _ channels"]


def crop_and_flip(
  image: Image,
  generator: np.random.Generator,
  *,
  padding: int = 4,
  flip: bool = True,
) -> Image:
  """Pads with black, crops back to the size at random, mirrors half the time.

  The usual augmentation of CIFAR (He et al. 2016, arxiv.org/abs/1512.03385,
  section 4.2). Black is 0 before normalisation, as in torchvision; digits and
  text are not to be mirrored.

  Args:
    image: uint8 [H, W, C].
    generator: drawn from three times, whatever the options.
    padding: pixels on each side; 0 leaves the position alone.
    flip: mirror left and right with probability 1/2.
  """
  height, width, channels = image.shape
  top, left = generator.integers(0, 2 * padding + 1, size=2)
  mirrored = flip & bool(generator.integers(2))
  # By hand: np.pad takes longer than everything else here together.
  canvas = np.zeros(
    (height + 2 * padding, width + 2 * padding, channels), image.dtype
  )
  canvas[padding : padding + height, padding : padding + width] = image
  image = canvas[top : top + height, left : left + width]
  return image[:, ::-1] if mirrored else image


def random_resized_crop(
  image: Image,
  generator: np.random.Generator,
  *,
  size: int,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  flip: bool = True,
) -> Image:
  """A random rectangle of the image, resized to [size, size, C].

  The Inception crop (Szegedy et al. 2015, arxiv.org/abs/1409.4842, section 6):
  its area is uniform in `scale` times the image's, its width / height
  log-uniform in `ratio`. After ten rectangles that do not fit, the largest
  central one whose aspect is within `ratio`, as torchvision does. Bilinear
  with antialiasing.
  """
  height, width, _ = image.shape
  left, top, wide, high = _rectangle(height, width, generator, scale, ratio)
  mirrored = flip & bool(generator.integers(2))
  box = (left, top, left + wide, top + high)
  image = _resize(image, (size, size), box)
  return image[:, ::-1] if mirrored else image


def _rectangle(
  height: int,
  width: int,
  generator: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  for _ in range(10):
    area = height * width * generator.uniform(*scale)
    aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
    wide = round(math.sqrt(area * aspect))
    high = round(math.sqrt(area / aspect))
    if 0 < wide <= width and 0 < high <= height:
      left = int(generator.integers(width - wide + 1))
      top = int(generator.integers(height - high + 1))
      return left, top, wide, high
  wide = min(width, max(1, round(height * ratio[1])))
  high = min(height, max(1, round(width / ratio[0])))
  return (width - wide) // 2, (height - high) // 2, wide, high


def center_crop(
  image: Image, *, size: int, shorter: int | None = None
) -> Image:
  """The central [size, size, C] of the image resized to a `shorter` side.

  Args:
    image: uint8 [H, W, C].
    size: side of the result in pixels.
    shorter: the shorter side before the crop; size / 0.875 by default (256 for
      224), the usual evaluation on ImageNet.

  Raises:
    UserError: `shorter` is less than `size`.
  """
  shorter = round(size / 0.875) if shorter is None else shorter
  if shorter < size:
    raise UserError(
      f"got shorter={shorter}, needs at least size={size}: raise shorter"
    )
  height, width, _ = image.shape
  factor = shorter / min(height, width)
  height = max(shorter, round(height * factor))
  width = max(shorter, round(width * factor))
  image = _resize(image, (width, height), None)
  top, left = (height - size) // 2, (width - size) // 2
  return image[top : top + size, left : left + size]


def _resize(
  image: Image, size: tuple[int, int], box: tuple[int, int, int, int] | None
) -> Image:
  # PIL knows a grey image as two axes only.
  picture = PIL.Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
  resized = picture.resize(size, PIL.Image.Resampling.BILINEAR, box=box)
  return np.asarray(resized).reshape(size[1], size[0], image.shape[2])


def mixup(
  batch: Batch, key: Array, *, alpha: float, num_classes: int
) -> dict[str, Array]:
  r"""$\lambda x_i + (1 - \lambda) x_{i-1}$, for images and labels alike.

  One $\lambda = \max(b, 1 - b)$, $b \sim Beta(\alpha, \alpha)$ for the whole
  batch, and the batch rolled by one as the partner. This follows big_vision's
  `utils.get_mixup`, which FunMatch trained with, and not the paper's random
  permutation (Zhang et al. 2018, arxiv.org/abs/1710.09412, section 2). The
  maximum changes no pair of images, only which of the two gives `index`. Mix
  once, on the global batch, so that student and teacher see the same images.

  Args:
    batch: `image` [B, ...] and `label` [B] or [B, classes]; `mask` and
      `labelled` where there are any, all else is left alone.
    key: PRNG key.
    alpha: > 0; 1 is uniform, less keeps nearer to one image.
    num_classes: width of the soft labels.

  Returns:
    The batch, with `label` float32 [B, num_classes]. `mask` and `labelled` are
    1 where both partners were: half an image of padding is no example.

  Raises:
    UserError: alpha is not positive; logits of the unmixed images.
  """
  if not alpha > 0:
    raise UserError(
      f"mixup got alpha={alpha}, needs a positive number: leave mixup out "
      "instead of setting it to 0"
    )
  if "teacher_logits" in batch:
    raise UserError(
      "mixup got a batch with teacher_logits, which are of the images before "
      "they are mixed: leave mixup out, or let a teacher network see them"
    )
  share = jax.random.beta(key, alpha, alpha)
  share = jnp.maximum(share, 1 - share)

  def mix(x):
    mixed = share * x + (1 - share) * jnp.roll(x, 1, axis=0)
    return mixed.astype(x.dtype)

  label = jnp.asarray(batch["label"])
  if label.ndim == 1:
    label = jax.nn.one_hot(label, num_classes)
  mixed = {"image": mix(batch["image"]), "label": mix(label)}
  for name in ("mask", "labelled"):
    if name in batch:
      mixed[name] = batch[name] * jnp.roll(batch[name], 1, axis=0)
  return {**batch, **mixed}
