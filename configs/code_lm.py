"""Code: a Llama of 1.5 M parameters teaches one of 0.2 M, on a CPU.

    python -m kdjax.train --config=configs/code_lm.py --workdir=runs/lm

The task: the sources of the running Python's standard library, 8 MB to train
on, split by file. Student alone and student distilled make as many updates, on
the same rows; the distilled one also gets the teacher's probabilities. Numbers
of different Python versions, whose sources differ, are not to be compared.

Tuned on the validation split with `benchmarks/tune_code_lm.py`: the learning
rates of teacher, student alone and student distilled, on a seed that is not
reported. Nothing on the test split. Results: docs/results/code_lm.md.
"""

from ml_collections import ConfigDict

from kdjax import recipes


def get_config(arg: str = "") -> ConfigDict:
  # Seconds on a CPU; the tests run every config so.
  smoke = "smoke" in recipes.words(arg, "smoke")
  c = ConfigDict()
  c.task = "text"
  c.seed = 0
  c.seeds = 1

  c.data = ConfigDict()
  c.data.name = "python_sources"  # or a prepared TFDS dataset
  c.data.path = ""  # instead of a name: files, by commas or a pattern
  c.data.field = "text"  # of a record: a text, or a list of messages
  c.data.data_dir = ""  # "" = the usual place for data sets
  c.data.train_split = "train"
  c.data.eval_split = "test"
  c.data.eval_path = ""  # of files: others to evaluate on, or
  c.data.eval_share = 0.05  # a share of their documents, set apart
  c.data.skip_empty = False
  c.data.sequence_length = 32 if smoke else 64
  c.data.teacher_length = 0  # with another tokenizer; 0 = as the student's
  c.data.batch_size = 8
  c.data.eval_batch_size = 64

  def llama(width: int, depth: int, heads: int) -> dict:
    return dict(
      model_type="llama",
      vocab_size=1024,
      hidden_size=width,
      intermediate_size=3 * width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      num_key_value_heads=heads,
      max_position_embeddings=512,
      rms_norm_eps=1e-6,
      rope_theta=10000.0,
      hidden_act="silu",
      initializer_range=0.02,
      tie_word_embeddings=True,
    )

  def network(model: dict) -> ConfigDict:
    return ConfigDict(
      dict(
        path="",  # pretrained weights, or a run; "" = from scratch
        model=model,  # what its config.json would hold
        tokenizer="bpe:1024",  # "" = that of `path`, or of the other
        dtype="float32",
        remat="none",
        partition=(),  # () = as the decoders do: kdjax/models/decoder
      )
    )

  c.teacher = network(llama(16, 1, 2) if smoke else llama(160, 4, 5))
  c.teacher.parts = 1  # of a batch, that the teacher takes one by one
  c.student = network(llama(8, 1, 2) if smoke else llama(64, 3, 4))
  c.student.inherit = dict(  # begin as a part of the teacher; 0 = all of it
    layers=0,  # how many, or which, from 1: (1, 3)
    width=0,
    mlp_width=0,
    kv_heads=0,
    importance="weights",  # or "activations"
    embeddings=False,  # take these alone; the rest is `model`
  )
  c.student.lora = dict(rank=0, alpha=16.0, targets=("layers/*/kernel",))
  c.head = "linear"  # or "dense": all logits at once

  def phase(rate: float, steps: int) -> dict:
    steps = 3 if smoke else steps
    return dict(
      steps=steps,
      microbatches=1,
      optimizer=dict(
        name="adamw",
        learning_rate=dict(
          schedule="warmup_cosine_decay_schedule",
          init_value=0.0,
          peak_value=rate,
          warmup_steps=max(steps // 20, 1),
          decay_steps=steps,
        ),
        b2=0.95,
        weight_decay=0.1,
        decay_on="kernels",
        clip=1.0,
      ),
    )

  c.phases = ConfigDict()  # one of 0 steps is left out
  c.phases.teacher = phase(2e-3, 2000)
  c.phases.alone = phase(3e-3, 1500)
  c.phases.distilled = phase(3e-3, 1500)

  # total = alpha * hard + (1 - alpha) * T**2 * soft; numbers or schedules.
  c.alpha = 0.1
  c.hard_weight = None
  c.soft_weight = None
  c.temperature = 1.0
  c.hard = dict(name="cross_entropy", label_smoothing=0.0)
  c.soft = dict(name="kl")
  c.terms = ConfigDict()

  c.sample = ConfigDict()
  c.sample.prompts = ("def read(self, size",)
  c.sample.max_new_tokens = 8 if smoke else 64
  c.sample.temperature = 0.0  # 0 = the most probable token each time
  c.sample.top_p = 1.0

  c.mesh = ConfigDict()  # devices along each axis; -1 = what the others leave
  c.mesh.data = -1  # examples are split
  c.mesh.fsdp = 1  # and parameters with them
  c.mesh.model = 1  # parameters and the work on them are split
  c.show_sharding = False  # True = a table of what lies where

  c.save_every = 3 if smoke else 750
  c.save_minutes = 0.0  # more checkpoints by the clock; 0 = none
  c.keep_last = 2
  c.keep_best = 1
  c.on_nan = "stop"  # or "skip": leave out an update that is not finite
  c.profile = 0  # steps of each phase to trace into <folder>/profile
  c.hang_minutes = 0.0  # without a step, then the process ends; 0 = never
  return c
