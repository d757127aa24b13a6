"""Vision transformers: `vit`, plain (ViT) or with a distillation token (DeiT).

Taps, for n blocks, S tokens and heads of d channels:

    embed                        [B, S, D]        what the first block reads
    block_1 ... block_n          [B, S, D]        the residual stream
    attention_1 ... attention_n  [B, heads, S, S] probabilities, float32
    queries_i, keys_i, values_i  [B, heads, S, d]
    pooled                       [B, D]           what `classifier` reads
    class_logits, distillation_logits  [B, classes]   where distilled

The blocks are scanned: of a kind of which one tap is asked for, those of all
blocks are made.

The class token is token 0, the distillation token 1; the patches follow, row by
row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kdjax import errors, pins
from kdjax.types import Output

_init = nnx.initializers.truncated_normal(0.02)

# How it lies on a mesh: heads and neurons along `model`, kernels by their rows
# along `fsdp`; the first axis is the depth.
PARTITION = (
  (r"(query|key|value|expand)/kernel$", (None, "fsdp", "model")),
  (r"(output|contract)/kernel$", (None, ("model", "fsdp"), None)),
  (r"(query|key|value|expand)/bias$", (None, "model")),
)


def _linear(inputs: int, outputs: int, **shared: Any) -> nnx.Linear:
  return nnx.Linear(inputs, outputs, kernel_init=_init, **shared)


def _norm(width: int, epsilon: float, **shared: Any) -> nnx.LayerNorm:
  # E x² - (E x)² may round to zero, and these epsilons go down to 1e-12.
  return nnx.LayerNorm(
    width, epsilon=epsilon, use_fast_variance=False, **shared
  )


class Attention(nnx.Module):
  """Softmax(Q Kᵀ / √d) V in each head, then one linear map."""

  def __init__(self, width: int, heads: int, **shared: Any):
    self.heads = heads
    self.query = _linear(width, width, **shared)
    self.key = _linear(width, width, **shared)
    self.value = _linear(width, width, **shared)
    self.output = _linear(width, width, **shared)

  def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
    def heads(y: Array) -> Array:
      return y.reshape(*y.shape[:2], self.heads, -1).swapaxes(1, 2)

    q, k, v = (heads(f(x)) for f in (self.query, self.key, self.value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    probability = jax.nn.softmax(scores.astype(jnp.float32))
    y = jnp.einsum("bhqk,bhkd->bqhd", probability.astype(v.dtype), v)
    taps = {"attention": probability, "queries": q, "keys": k, "values": v}
    return self.output(y.reshape(x.shape)), taps


class MLP(nnx.Module):
  """Two linear maps around a GELU (the exact one, not tanh's)."""

  def __init__(self, width: int, hidden: int, **shared: Any):
    self.expand = _linear(width, hidden, **shared)
    self.contract = _linear(hidden, width, **shared)

  def __call__(self, x: Array) -> Array:
    return self.contract(nnx.gelu(self.expand(x), approximate=False))


class Block(nnx.Module):
  """x += attention(norm(x)); x += mlp(norm(x))."""

  def __init__(
    self, width: int, heads: int, mlp_width: int, epsilon: float, **shared: Any
  ):
    self.attention_norm = _norm(width, epsilon, **shared)
    self.attention = Attention(width, heads, **shared)
    self.mlp_norm = _norm(width, epsilon, **shared)
    self.mlp = MLP(width, mlp_width, **shared)

  def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
    attended, taps = self.attention(self.attention_norm(x))
    x = x + attended
    return x + self.mlp(self.mlp_norm(x)), taps


def _stacked(depth: int, *sizes: Any, rngs: nnx.Rngs, **shared: Any) -> Block:
  @nnx.split_rngs(splits=depth)
  @nnx.vmap
  def draw(rngs: nnx.Rngs) -> Block:
    return Block(*sizes, rngs=rngs, **shared)

  return draw(rngs)


class ViT(nnx.Module):
  """Patches and tokens, blocks, normalisation, one classifier or two.

  The blocks are one `Block` whose arrays have the depth as their first axis.
  """

  pinned = True  # see `adapters.from_nnx`

  def __init__(
    self,
    *,
    depth: int,
    width: int,
    heads: int,
    mlp_width: int,
    num_classes: int,
    channels: int,
    image_size: tuple[int, int],
    patch: int,
    distilled: bool,
    distillation_head: bool,
    epsilon: float,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    shared: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
    self.image_size, self.dtype = image_size, dtype

    def learned(*shape: int) -> nnx.Param:
      return nnx.Param(_init(rngs.params(), shape, jnp.float32))

    self.patches = nnx.Conv(
      channels,
      width,
      (patch, patch),
      strides=patch,
      padding="VALID",
      kernel_init=_init,
      **shared,
    )
    self.class_token = learned(1, 1, width)
    self.distillation_token = learned(1, 1, width) if distilled else None
    height, across = (side // patch for side in image_size)
    self.positions = learned(1, 1 + distilled + height * across, width)
    self.blocks = _stacked(depth, width, heads, mlp_width, epsilon, **shared)
    self.norm = _norm(width, epsilon, **shared)
    self.classifier = _linear(width, num_classes, **shared)
    two = distilled and distillation_head
    self.distillation_classifier = (
      _linear(width, num_classes, **shared) if two else None
    )

  def __call__(self, image: Float[Array, "b h w c"]) -> Output:
    if image.shape[1:3] != self.image_size:
      got, needed = (
        "x".join(map(str, s)) for s in (image.shape[1:3], self.image_size)
      )
      raise errors.UserError(
        f"vit got an image of {got}, has positions for {needed}: give it "
        "image_size, or resize the images"
      )
    taps = {}
    x = taps["embed"] = self.embed(image)
    x, inner = self.encode(x)
    for name, layers in inner.items():
      taps |= {f"{name}_{n}": y for n, y in enumerate(layers, 1)}
    x = self.norm(x[:, :2])  # only the tokens that are classified
    pooled = taps["pooled"] = x[:, 0]
    logits = self.classifier(pooled)
    if self.distillation_classifier is not None:
      taps["class_logits"] = logits
      taps["distillation_logits"] = self.distillation_classifier(x[:, 1])
      logits = (logits + taps["distillation_logits"]) / 2
    return Output(logits, taps)

  def encode(self, x: Array) -> tuple[Array, dict[str, Array]]:
    """One block after another; what each taps, `[depth, ...]`.

    For the backward pass the linear maps' outputs are kept; what lies between
    two of them is computed again.
    """
    kind, params = nnx.split(self.blocks)

    @functools.partial(
      jax.checkpoint,
      policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
      prevent_cse=False,  # a loop's body is apart from the other pass's
    )
    def step(x: Array, layer: nnx.State) -> tuple[Array, dict[str, Array]]:
      x, taps = nnx.merge(kind, layer)(pins.by_example(x))
      return x, taps | {"block": x}

    return jax.lax.scan(step, x, params)

  def embed(self, image: Array) -> Array:
    """Tokens and patches with their positions, `[B, S, D]`."""
    patches = pins.by_example(self.patches(image))
    patches = patches.reshape(image.shape[0], -1, patches.shape[-1])
    tokens = (self.class_token, self.distillation_token)
    learned = [
      jnp.broadcast_to(token[...], (image.shape[0], 1, token.shape[-1]))
      for token in tokens
      if token is not None
    ]
    x = jnp.concatenate([*learned, patches], axis=1) + self.positions[...]
    return pins.by_example(x.astype(self.dtype))


# size: (width, heads); 12 blocks, and an MLP four times as wide
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def vit(
  size: str,
  *,
  num_classes: int,
  channels: int = 3,
  image_size: int | tuple[int, int] = 224,
  patch: int = 16,
  distilled: bool = False,
  distillation_head: bool = True,
  depth: int = 0,
  width: int = 0,
  heads: int = 0,
  mlp_width: int = 0,
  epsilon: float = 1e-6,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  rngs: nnx.Rngs,
) -> ViT:
  """ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021), pre-norm.

  A distilled network's logits are the mean of its two classifiers', in training
  too. DeiT trains `class_logits` on the labels and `distillation_logits` on the
  teacher: two losses, each on its own tap.

  Args:
    size: "tiny", "small" or "base": Ti/16, S/16, B/16 at 224 px.
    image_size: side, or (height, width), a multiple of `patch`: each patch has
      a learned position.
    distilled: adds the distillation token, and a classifier on it.
    distillation_head: False leaves that classifier out: the token is there, the
      class token alone is classified (the hub's `DeiTForImageClassification`).
    depth, width, heads, mlp_width: other sizes; 0 = those of `size`, or
      `4 * width` for the MLP.
    epsilon: of the normalisations: 1e-6 for weights of timm and torchvision,
      1e-12 for most of the model hub's.
    axis_name: for the signature of all networks; there are no batch statistics.
    dtype: of the computation; parameters are float32.

  Raises:
    UserError: an unknown size; sizes that do not divide.
  """
  del axis_name
  known = errors.choose("size of vit", size, SIZES)
  width, heads = width or known[0], heads or known[1]
  if isinstance(image_size, int):
    image_size = (image_size, image_size)
  sides = (image_size[0], image_size[1])  # a config may give a list
  if width % heads:
    raise errors.UserError(
      f"vit got width={width}, heads={heads}: the width must be a multiple of "
      "the heads"
    )
  if any(side % patch for side in sides):
    raise errors.UserError(
      f"vit got image_size={image_size}, patch={patch}: the image must be a "
      "multiple of the patch"
    )
  return ViT(
    depth=depth or 12,
    width=width,
    heads=heads,
    mlp_width=mlp_width or 4 * width,
    num_classes=num_classes,
    channels=channels,
    image_size=sides,
    patch=patch,
    distilled=distilled,
    distillation_head=distillation_head,
    epsilon=epsilon,
    dtype=dtype,
    rngs=rngs,
  )
