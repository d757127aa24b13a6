import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import data
from kdjax.types import UserError


def picture(height, width, channels=3, seed=0):
  generator = np.random.default_rng(seed)
  return generator.integers(1, 256, (height, width, channels), np.uint8)


def crops(image, padding, flip):
  """Every image that the augmentation may give, by (top, left, mirrored)."""
  height, width, _ = image.shape
  wide = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
  wide[padding : padding + height, padding : padding + width] = image
  made = {}
  for top in range(2 * padding + 1):
    for left in range(2 * padding + 1):
      crop = wide[top : top + height, left : left + width]
      made[crop.tobytes()] = (top, left, False)
      if flip:
        made[crop[:, ::-1].tobytes()] = (top, left, True)
  return made


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_crop_and_flip_reaches_every_crop_equally_often(padding, flip):
  image = picture(6, 5)
  known, generator = crops(image, padding, flip), np.random.default_rng(0)
  seen = dict.fromkeys(known.values(), 0)
  draws = 60 * len(known)
  for _ in range(draws):
    got = data.crop_and_flip(image, generator, padding=padding, flip=flip)
    assert got.shape == image.shape
    seen[known[got.tobytes()]] += 1
  counts = np.array(list(seen.values()))
  # Chi-square: mean df, standard deviation sqrt(2 df); 5 of them allowed.
  df = len(counts) - 1
  assert ((counts - 60) ** 2 / 60).sum() <= df + 5 * np.sqrt(2 * df) + 1e-9


def gradient(height, width):
  """Red tells the row, green the column, each linear from 0 to 250."""
  image = np.zeros((height, width, 3))
  image[..., 0] = np.linspace(0, 250, height)[:, None]
  image[..., 1] = np.linspace(0, 250, width)
  return np.uint8(np.round(image))


def rectangle(crop, height, width):
  """Height and width of the rectangle that a crop of `gradient` shows."""
  size = len(crop)
  spans = np.float64([np.ptp(crop[..., 0]), np.ptp(crop[..., 1])])
  # Between the centres of the outer pixels lie (size - 1) / size of it.
  return spans / 250 * [height - 1, width - 1] * size / (size - 1)


def test_random_resized_crop_keeps_to_scale_and_ratio():
  image, generator = gradient(200, 240), np.random.default_rng(0)
  areas, ratios, mirrored, centers = [], [], [], []
  for _ in range(300):
    got = data.random_resized_crop(
      image, generator, size=24, scale=(0.1, 0.4), ratio=(0.5, 2.0)
    )
    assert got.shape == (24, 24, 3)
    assert got.dtype == np.uint8
    high, wide = rectangle(got, 200, 240)
    areas.append(high * wide / (200 * 240))
    ratios.append(wide / high)
    mirrored.append(got[12, 0, 1] > got[12, -1, 1])
    centers.append((got[..., 0].mean(), got[..., 1].mean()))
  # Antialiasing blurs the outer pixels: the measure is good to about 10 %.
  assert 0.085 < min(areas) < 0.13
  assert 0.34 < max(areas) < 0.46
  assert np.mean(areas) == pytest.approx(0.25, abs=0.03)
  assert 0.44 < min(ratios) < 0.6
  assert 1.7 < max(ratios) < 2.3
  assert np.median(ratios) == pytest.approx(1, abs=0.12)  # log-uniform
  assert 0.4 < np.mean(mirrored) < 0.6
  np.testing.assert_allclose(np.mean(centers, axis=0), 125, atol=8)
  assert (np.std(centers, axis=0) > 20).all()


def test_random_resized_crop_of_a_strip_falls_back_to_its_middle():
  image, generator = gradient(10, 300), np.random.default_rng(0)
  for _ in range(5):
    got = data.random_resized_crop(
      image, generator, size=8, scale=(1.0, 1.0), flip=False
    )
    # 10 high, 13 wide at most: columns 143 to 156 of 300.
    np.testing.assert_allclose(got[..., 1], 125, atol=7)
    assert np.ptp(got[..., 0]) > 180


def test_random_resized_crop_of_the_whole_is_the_image():
  image = picture(8, 8)
  got = data.random_resized_crop(
    image,
    np.random.default_rng(0),
    size=8,
    scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    flip=False,
  )
  np.testing.assert_array_equal(got, image)


@pytest.mark.parametrize("channels", [1, 3])
def test_center_crop_takes_the_middle(channels):
  image = picture(8, 13, channels)
  got = data.center_crop(image, size=4, shorter=8)
  np.testing.assert_array_equal(got, image[2:6, 4:8])


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (75, 75)])
def test_center_crop_resizes_the_shorter_side(shape):
  got = np.float64(data.center_crop(gradient(*shape), size=28))
  # 28 / 0.875 = 32 is the shorter side; both scales are min(shape) / 32.
  step = min(shape) / 32
  for axis, channel in ((0, 0), (1, 1)):
    slope = np.diff(got[..., channel], axis=axis).mean()
    assert slope == pytest.approx(250 / (shape[axis] - 1) * step, rel=0.03)
    assert got[..., channel].mean() == pytest.approx(125, abs=5)


def test_center_crop_refuses_a_side_below_the_crop():
  with pytest.raises(UserError, match="shorter=8"):
    data.center_crop(picture(20, 20), size=10, shorter=8)


def mixable(num_rows=5, num_classes=3):
  generator = np.random.default_rng(0)
  return {
    "image": jnp.float32(generator.normal(size=(num_rows, 2, 2, 1))),
    "label": jnp.arange(num_rows) % num_classes,
    "mask": jnp.float32([1, 1, 0, 1, 1]),
    "labelled": jnp.float32([1, 0, 1, 1, 1]),
    "index": jnp.arange(num_rows),
  }


def test_mixup_matches_the_equation():
  batch, key = mixable(), jax.random.key(3)
  got = data.mixup(batch, key, alpha=0.4, num_classes=3)
  x = np.float64(batch["image"])
  partner = x[[4, 0, 1, 2, 3]]
  share = ((np.float64(got["image"]) - partner) / (x - partner)).mean()
  assert 0.5 <= share <= 1
  np.testing.assert_allclose(
    got["image"], share * x + (1 - share) * partner, rtol=1e-5, atol=1e-5
  )
  one_hot = np.eye(3)[[0, 1, 2, 0, 1]]
  want = share * one_hot + (1 - share) * one_hot[[4, 0, 1, 2, 3]]
  np.testing.assert_allclose(got["label"], want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(got["mask"], [1, 1, 0, 0, 1])
  np.testing.assert_array_equal(got["labelled"], [1, 0, 0, 1, 1])
  np.testing.assert_array_equal(got["index"], batch["index"])


def test_mixup_draws_the_folded_beta_distribution():
  batch = {"image": jnp.eye(2), "label": jnp.arange(2)}

  def share(key):
    mixed = data.mixup(batch, key, alpha=2.0, num_classes=2)
    return mixed["label"][0, 0]

  shares = jax.vmap(share)(jax.random.split(jax.random.key(0), 2000))
  # Beta(2, 2) has the density 6 x (1 - x) and the variance 1/20; folded at 1/2
  # its mean is 12 * integral of x^2 (1 - x) over [1/2, 1] = 11/16.
  assert shares.min() >= 0.5
  np.testing.assert_allclose(shares.mean(), 11 / 16, atol=0.015)
  np.testing.assert_allclose(shares.var(), 1 / 20 - (3 / 16) ** 2, rtol=0.15)


def test_mixup_is_jittable_takes_soft_labels_and_keeps_the_dtype():
  batch, key = mixable(), jax.random.key(1)
  hard = data.mixup(batch, key, alpha=1.0, num_classes=3)
  soft = {**batch, "label": jax.nn.one_hot(batch["label"], 3)}
  soft["image"] = soft["image"].astype(jnp.bfloat16)
  mix = jax.jit(lambda b, k: data.mixup(b, k, alpha=1.0, num_classes=3))
  got = mix(soft, key)
  np.testing.assert_allclose(got["label"], hard["label"], rtol=1e-6)
  assert got["image"].dtype == jnp.bfloat16
  assert got["label"].dtype == jnp.float32


def test_mixup_without_masks_adds_none():
  batch = {"image": jnp.ones((2, 1)), "label": jnp.arange(2)}
  got = data.mixup(batch, jax.random.key(0), alpha=1.0, num_classes=2)
  assert set(got) == {"image", "label"}


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_mixup_refuses_an_alpha_without_a_distribution(alpha):
  with pytest.raises(UserError, match="leave mixup out"):
    data.mixup(mixable(), jax.random.key(0), alpha=alpha, num_classes=3)
