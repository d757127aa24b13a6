"""Does reading ImageNet keep up? Images a second, and what a step waits.

    python benchmarks/input_pipeline.py

The set is made on the spot: JPEGs of 500 x 375 pixels and about 110 kB, of
gradients and noise, as TFDS writes ArrayRecord. It is read by
`kdjax.data.train_batches` with `random_resized_crop` to 224, as
`configs/imagenet` do. Printed:

  parts    milliseconds of one core for each part of an image
  threads  images a second of the wall, and of one core's seconds, by number
           of threads
  wait     `perf/input_wait` of a step that computes for 100 ms, by batch size.
           The device is `time.sleep` here, which takes no core, as an
           accelerator does not: a CPU's own computation would take the cores
           that decode. Goal: 2 %.
  cores    that a batch needs for a step of 100 ms: cores' seconds an image,
           times the batch, / 0.1 s

Wall times on a machine that others share are too long; cores' seconds hardly.
"""

import argparse
import contextlib
import functools
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from step_flops import RESULTS, save

from kdjax import data
from kdjax.clock import Clock
from kdjax.data import augment
from kdjax.perf import Meter

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tfds_folder

MEAN, STD = data.NORMALIZATION["imagenet2012"]
COMPUTES = 0.1


def picture(index: int, noise: float = 30.0) -> np.ndarray:
  """Gradients and noise, uint8 [375, 500, 3]."""
  draw = np.random.default_rng(index)
  down, right = np.mgrid[0:375, 0:500][..., None] / 500
  slopes = draw.uniform(-200, 200, (2, 3))
  smooth = 128 + down * slopes[0] + right * slopes[1]
  noisy = smooth + draw.normal(0, noise, (375, 500, 1))
  return np.clip(noisy, 0, 255).astype(np.uint8)


def encode(image: np.ndarray) -> bytes:
  stream = io.BytesIO()
  PIL.Image.fromarray(image).save(stream, "JPEG", quality=90)
  return stream.getvalue()


def prepare(root: str, count: int) -> int:
  """Writes the set; returns the mean size of a file."""
  import tensorflow_datasets as tfds

  files = [encode(picture(n)) for n in range(count)]
  features = {
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(num_classes=10),
  }
  rows = [(n, {"image": file, "label": n % 10}) for n, file in enumerate(files)]
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # what TFDS tells of it
    tfds_folder.write(root, "Shaped", "1.0.0", features, {"train": rows})
  return sum(map(len, files)) // count


def core_ms(f: Callable[[], Any], calls: int = 40) -> float:
  """Milliseconds of one core for a call, the median."""
  times = []
  for _ in range(calls):
    begun = time.thread_time()
    f()
    times.append(time.thread_time() - begun)
  return 1e3 * statistics.median(times)


def parts(source: Any) -> dict[str, float]:
  """Where the time of an image goes."""
  file = encode(picture(0))
  image = source.examples[0]["image"]
  draw = np.random.default_rng(0)
  rows = np.zeros((32, 224, 224, 3), np.uint8)
  normalize = data.pipeline.normalizer(source, MEAN, STD)
  return {
    "read and decode": core_ms(lambda: source.examples[0]),
    "of it PIL's decoding": core_ms(
      lambda: np.asarray(PIL.Image.open(io.BytesIO(file)))
    ),
    "crop and resize": core_ms(
      lambda: augment.random_resized_crop(image, draw, size=224)
    ),
    "normalise": core_ms(lambda: normalize(rows)) / 32,
  }


def batches(source: Any, batch_size: int, threads: int) -> Any:
  crop = functools.partial(augment.random_resized_crop, size=224)
  return iter(
    data.train_batches(
      source,
      batch_size=batch_size,
      seed=0,
      mean=MEAN,
      std=STD,
      augment=crop,
      num_threads=threads,
    )
  )


def throughput(source: Any, threads: int, count: int) -> dict[str, float]:
  """Of `count` batches of 32."""
  reader = batches(source, 32, threads)
  next(reader)
  wall, cores = time.perf_counter(), time.process_time()
  for _ in range(count):
    next(reader)
  wall, cores = time.perf_counter() - wall, time.process_time() - cores
  return {
    "threads": threads,
    "images_per_second": 32 * count / wall,
    "images_per_core_second": 32 * count / cores,
    "cores_busy": cores / wall,
  }


def waiting(source: Any, batch_size: int, steps: int) -> dict[str, float]:
  """The share of the steps' time that goes by before a batch is there."""
  reader, clock = batches(source, batch_size, 4), Clock()
  next(reader)
  time.sleep(1.0)  # a run compiles before its first step, and reads meanwhile
  meter = Meter(clock, batch_size, [])
  with clock.at("steps"):
    for n in range(steps):
      if n == 8:  # more than what was read ahead
        meter.read()
      with clock.at("input"):
        next(reader)
      time.sleep(COMPUTES)
      clock.tick()
    share = meter.read()["perf/input_wait"]
  return {"batch_size": batch_size, "input_wait": share}


def measure(count: int, rounds: int) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as root:
    size = prepare(root, count)
    source = data.load("shaped", "train", data_dir=root)
    found: dict[str, Any] = {"bytes": size, "parts": parts(source)}
    found["threads"] = [
      throughput(source, threads, rounds) for threads in (1, 2, 4)
    ]
    found["wait"] = [
      waiting(source, rows, 8 + 2 * rounds) for rows in (4, 8, 16, 32)
    ]
  best = max(row["images_per_core_second"] for row in found["threads"])
  found["cores_needed"] = {
    str(rows): rows / best / COMPUTES for rows in (32, 128, 256, 1024)
  }
  found["load"] = os.getloadavg()[0]
  return found


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--images", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=12)
  parser.add_argument(
    "--out", type=Path, default=RESULTS / "input_pipeline.json"
  )
  given = parser.parse_args(arguments)
  found = measure(given.images, given.rounds)
  print(f"{found['bytes'] / 1e3:.0f} kB an image")
  for name, value in found["parts"].items():
    print(f"  {name:22}{value:8.2f} ms of a core")
  for row in found["threads"]:
    print(
      f"  {row['threads']} threads{row['images_per_second']:10.0f} images/s"
      f"{row['images_per_core_second']:8.0f} a core's second"
      f"{row['cores_busy']:8.2f} cores busy"
    )
  for row in found["wait"]:
    print(
      f"  batch {row['batch_size']:4}: input wait {row['input_wait']:.1%} of a "
      "step of 100 ms"
    )
  for rows, cores in found["cores_needed"].items():
    print(f"  batch {rows:>4} needs {cores:.1f} cores")
  save(given.out, **found)


if __name__ == "__main__":
  main()
