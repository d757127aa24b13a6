"""A checkpoint of the model hub teaches a smaller one, on your own texts.

    python -m kdjax.train --config=configs/llm.py --workdir=runs/llm \\
      --config.teacher.path=Qwen/Qwen3-4B \\
      --config.student.path=Qwen/Qwen3-0.6B --config.data.path=data.jsonl
    python -m kdjax.export --workdir=runs/llm --output=student

Paths are folders with config.json, safetensors and tokenizer.json, or names on
the hub, downloaded once. `data.path` is jsonl, parquet or plain text: texts
are packed into rows, of conversations the loss counts what the assistant says.
Families: docs/decoder.md; what becomes of texts: docs/text.md.

NOBODY HAS RUN THIS ON A CHECKPOINT OF THAT SIZE YET: steps, learning rate and
alpha are customary values, not tuned ones.
"""

from ml_collections import ConfigDict

from kdjax import recipes


def get_config(arg: str = "") -> ConfigDict:
  # Three updates of short rows, to see that it runs.
  smoke = "smoke" in recipes.words(arg, "smoke")
  c = ConfigDict()
  c.task = "text"
  c.seed = 0
  c.seeds = 1

  c.data = ConfigDict()
  c.data.name = ""
  c.data.path = ""
  c.data.field = "text"  # or "messages"
  c.data.data_dir = ""
  c.data.train_split = ""
  c.data.eval_split = ""
  c.data.eval_path = ""
  c.data.eval_share = 0.01
  c.data.skip_empty = True
  c.data.sequence_length = 16 if smoke else 1024
  c.data.teacher_length = 0
  c.data.batch_size = 8
  c.data.eval_batch_size = 8

  network = dict(
    path="", model={}, tokenizer="", dtype="bfloat16", partition=()
  )
  c.teacher = ConfigDict(dict(network, remat="none", parts=1))
  c.student = ConfigDict(dict(network, remat="block"))
  c.student.inherit = dict(
    layers=0,
    width=0,
    mlp_width=0,
    kv_heads=0,
    importance="weights",
    embeddings=False,
  )
  c.student.lora = dict(rank=0, alpha=16.0, targets=("layers/*/kernel",))
  c.head = "linear"

  def phase(steps: int) -> dict:
    return dict(
      steps=steps,
      microbatches=1,
      optimizer=dict(
        name="adamw",
        learning_rate=dict(
          schedule="warmup_cosine_decay_schedule",
          init_value=0.0,
          peak_value=2e-5,
          warmup_steps=max(steps // 20, 1),
          decay_steps=max(steps, 2),
        ),
        b2=0.95,
        weight_decay=0.1,
        decay_on="kernels",
        clip=1.0,
      ),
    )

  c.phases = ConfigDict()
  c.phases.teacher = phase(0)
  c.phases.alone = phase(0)  # as many as distilled, to see what that gains
  c.phases.distilled = phase(3 if smoke else 1000)

  c.alpha = 0.1
  c.hard_weight = None
  c.soft_weight = None
  c.temperature = 1.0
  c.hard = dict(name="cross_entropy", label_smoothing=0.0)
  c.soft = dict(name="kl")
  c.terms = ConfigDict()

  c.sample = ConfigDict()
  c.sample.prompts = ()
  c.sample.max_new_tokens = 64
  c.sample.temperature = 0.0
  c.sample.top_p = 1.0

  c.mesh = ConfigDict()  # devices along each axis; -1 = what the others leave
  c.mesh.data = -1  # examples are split
  c.mesh.fsdp = 1  # and parameters with them
  c.mesh.model = 1  # parameters and the work on them are split
  c.show_sharding = False  # True = a table of what lies where

  c.save_every = 3 if smoke else 200
  c.save_minutes = 0.0  # more checkpoints by the clock; 0 = none
  c.keep_last = 2
  c.keep_best = 1
  c.on_nan = "stop"
  c.profile = 0
  c.hang_minutes = 0.0
  return c
