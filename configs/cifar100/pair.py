"""CIFAR-100: one of the papers' pairs of networks by one of their methods.

    python -m kdjax.train --workdir=runs/dkd \\
      --config=configs/cifar100/pair.py:resnet32x4-resnet8x4,dkd

`pair.py:TEACHER-STUDENT,METHOD`; the default is resnet56-resnet20,kl. Add
`,smoke` for three updates of tiny networks, `,dot` for the two momenta of DOT.
The teacher is trained first, or named: --config.teacher.checkpoint=FOLDER
(`teacher.py` trains one alone). The data is prepared once, the only step that
needs TensorFlow:

    pip install tensorflow-cpu
    python -c "import tensorflow_datasets as t; t.data_source('cifar100')"

Published accuracies, %, by this recipe (240 epochs). Those of CRD's repository
(upper part) are of the LAST epoch. Below the line they are of other authors:
dkd and zscore of the BEST epoch on the test set, about 0.3 higher for that
alone, the others of an epoch not known here. kdjax reports the last. NOBODY
HAS RUN THESE HERE: no row below was measured with kdjax.

  pair: teacher       resnet wrn-   resnet vgg13  resnet resnet wrn-
                      32x4   40-2   56            32x4   32x4   40-2
        student       resnet wrn-   resnet vgg8   shuf-  shuf-  shuf-
                      8x4    16-2   20            fle v1 fle v2 fle v1
  teacher             79.42  75.61  72.34  74.64  79.42  79.42  75.61
  student alone       72.50  73.26  69.06  70.36  70.50  71.82  70.50
  kl                  73.33  74.92  70.66  72.98  74.07  74.45  74.83
  hint (FitNet)       73.50  73.58  69.21  71.02  73.59  73.54  73.73
  attention_transfer  73.44  74.08  70.55  71.43  71.73  72.73  73.32
  similarity_pres..   72.94  73.83  69.67  72.68  73.48  74.56  74.52
  correlation_cong..  72.97  73.56  69.63  70.71  71.14  71.29  71.38
  variational_inf..   73.09  74.11  70.38  71.23  73.38  73.40  73.61
  relational (RKD)    71.90  73.35  69.61  71.48  72.28  73.21  72.21
  probabilistic       73.64  74.54  70.34  72.88  74.10  74.69  73.89
  activation_bound..  73.17  72.50  69.47  70.94  73.55  74.31  73.34
  factor              72.86  73.25  69.84  70.58  71.75  72.50  72.03
  flow                72.62  72.91  69.95  70.23    -      -      -
  nst                 73.30  73.68  69.60  71.53  74.12  74.68  74.89
  crd                 75.51  75.48  71.16  73.94  75.11  75.65  76.05
  --------------------------------------------------------------------
  itrd                76.19  76.12  71.47  74.93  76.91  77.40  77.35
  dkd                 76.32  76.24  71.97  74.68  76.45  77.07  76.70
  dist                76.31  75.51  71.75  73.89  76.34  77.35  76.40
  ttm                 76.17  76.23  71.83  74.33  74.18  76.57  75.39
  wttm                76.06  76.37  71.92  74.44  74.37  76.55  75.42
  zscore (KD + LS)    76.62  76.11  71.43  74.36    -    75.56    -
  kl,dot              75.12    -      -    73.77    -    75.55    -

overhaul, review, inter_channel and simkd have published numbers too, which
could not be checked here against their source.

Authors tune some of these per pair (the weights of dkd, ttm, wttm and zscore,
T of zscore); below stands one setting for all.
"""

from ml_collections import ConfigDict

from kdjax import errors, recipes

EPOCH = 50_000 // 64
POOLED = dict(student="pooled", teacher="pooled")
LINEAR = dict(name="linear", norm=True)
# Over the first 20 epochs, as dkd and review have it.
WARM_UP = dict(
  schedule="linear_schedule",
  init_value=0.0,
  end_value=1.0,
  transition_steps=20 * EPOCH,
)


def soft(**loss) -> dict:
  return dict(alpha=None, hard_weight=1.0, soft_weight=1.0, soft=loss)


def beside_labels(**terms) -> dict:
  """Hard loss and terms, without the KL: CRD's comparison."""
  return dict(alpha=None, hard_weight=1.0, soft_weight=0.0, terms=terms)


def num_stages(network: str) -> int:
  return 4 if network.startswith(("vgg", "mobilenet")) else 3


def methods(student: str, teacher: str) -> dict:
  """What each method changes in the recipe for these two networks."""
  last = dict(
    student=f"stage_{num_stages(student)}",
    teacher=f"stage_{num_stages(teacher)}",
  )
  # Where the student's maps are the smaller from its stem on, a stage learns
  # from the one of its size: nothing is lost in pooling the teacher's.
  ours, theirs, further = "*", "*", 0
  if student.startswith("shufflenet"):
    ours, theirs, further = "[12]", "[23]", 1
  elif student == "mobilenet_v2":
    ours, theirs = "[123]", "[123]"
  stages = dict(
    student=f"stage_{ours}", teacher=f"stage_{theirs}", map="evenly"
  )
  middle = dict(student="stage_2", teacher=f"stage_{2 + further}")
  # MobileNetV2's stages end before any ReLU.
  linear = student == "mobilenet_v2"
  before_relu = dict(
    student=f"{'stage' if linear else 'preact'}_{ours}",
    teacher=f"preact_{theirs}",
    map="evenly",
  )
  return {
    "kl": dict(),
    "dkd": soft(name="dkd", target_weight=1.0, nontarget_weight=8.0)
    | dict(soft_weight=WARM_UP),
    "nkd": soft(name="nkd", gamma=1.5) | dict(temperature=1.0),
    "dist": soft(name="dist") | dict(temperature=4.0),
    "zscore": soft(name="kl", zscore=True)
    | dict(hard_weight=0.1, soft_weight=9.0, temperature=2.0),
    # The exponent softens the teacher alone; the student's T is 1.
    "ttm": soft(name="ttm", exponent=0.1)
    | dict(soft_weight=45.0, temperature=1.0),
    "wttm": soft(name="wttm", exponent=0.2)
    | dict(soft_weight=4.0, temperature=1.0),
    "hint": beside_labels(
      hint=dict(
        name="hint",
        weight=100.0,
        **middle,
        projector=dict(name="conv", size=1),
      )
    ),
    "attention_transfer": beside_labels(
      attention=dict(name="attention_transfer", weight=1000.0, **stages)
    ),
    "nst": beside_labels(nst=dict(name="nst", weight=50.0, **stages)),
    "variational_information": beside_labels(
      vid=dict(
        name="variational_information",
        weight=1.0,
        **stages,
        projector=dict(name="mlp", num_hidden=2),
      )
    ),
    "similarity_preserving": beside_labels(
      sp=dict(name="similarity_preserving", weight=3000.0, **last)
    ),
    "correlation_congruence": beside_labels(
      cc=dict(
        name="correlation_congruence",
        weight=0.02,
        **POOLED,
        projector=dict(name="linear"),
      )
    ),
    "relational": beside_labels(
      distance=dict(name="relational_distance", weight=25.0, **POOLED),
      angle=dict(name="relational_angle", weight=50.0, **POOLED),
    ),
    "probabilistic": beside_labels(
      pkt=dict(name="probabilistic", weight=30_000.0, **POOLED)
    ),
    "activation_boundary": beside_labels(
      boundary=dict(
        name="activation_boundary", weight=3e-3, **before_relu, projector=LINEAR
      )
    ),
    "factor": beside_labels(factor=dict(name="factor", weight=200.0, **last)),
    "flow": beside_labels(
      flow=dict(name="flow", weight=50.0, **stages, projector=LINEAR)
    ),
    "overhaul": beside_labels(
      overhaul=dict(
        name="overhaul", weight=1e-3, **before_relu, projector=LINEAR
      )
    ),
    "review": beside_labels(
      review=dict(name="review", weight=WARM_UP, **stages)
    ),
    "simple": beside_labels(srd=dict(name="simple", weight=1.0, **POOLED))
    | dict(soft_weight=1.0, temperature=1.0),
    "masked_generative": beside_labels(
      mgd=dict(
        name="masked_generative",
        weight=1.0,
        **stages,
        mask_ratio=0.15,
        projector=dict(name="linear"),
      )
    ),
    "inter_channel": beside_labels(
      ickd=dict(name="inter_channel", weight=5.0, **stages, projector=LINEAR)
    ),
    "itrd": beside_labels(
      correlation=dict(
        name="correlation",
        weight=2.0,
        **POOLED,
        projector=dict(name="linear"),
      ),
      mutual=dict(
        name="mutual", weight=1.0, **POOLED, projector=dict(name="linear")
      ),
    ),
    "crd": beside_labels(crd=dict(name="crd", weight=0.8, **POOLED)),
    "info_nce": beside_labels(nce=dict(name="info_nce", weight=0.8, **POOLED)),
    "simkd": dict(
      alpha=None,
      hard_weight=0.0,
      soft_weight=0.0,
      terms=dict(
        features=dict(
          name="hint",
          weight=1.0,
          student="projected",
          teacher=last["teacher"],
        )
      ),
    ),
    # Three kinds at once, each with its own schedule.
    "multi_level": dict(
      terms=dict(
        hint=dict(name="hint", weight=10.0, **stages, projector=LINEAR),
        attention=dict(
          name="attention_transfer",
          weight=dict(
            schedule="cosine_decay_schedule",
            init_value=1000.0,
            decay_steps=240 * EPOCH,
          ),
          **stages,
        ),
      )
    ),
    # No teacher at all: what is left of one is a uniform error.
    "teacher_free": dict(
      soft=dict(name="teacher_free", correct=0.99), temperature=20.0
    ),
    "patient": dict(),
  }


def get_config(arg: str = "") -> ConfigDict:
  words = [w for w in arg.split(",") if w]
  smoke, dot = "smoke" in words, "dot" in words
  words = [w for w in words if w not in ("smoke", "dot")]
  pair, method, *rest = [*words, *("resnet56-resnet20", "kl")[len(words) :]]
  if rest:
    raise errors.UserError(f"pair.py got {arg!r}, takes TEACHER-STUDENT,METHOD")
  teacher, student = _split(pair)
  shown = ("resnet8",) * 2 if smoke else (student, teacher)
  changes = errors.choose("method", method, methods(*shown))
  c = recipes.cifar100(teacher, student, smoke=smoke)
  for key, value in changes.items():
    c[key] = ConfigDict(value) if isinstance(value, dict) else value
  if method == "simkd":
    c.student.classifier = "teacher"
  if method == "patient":
    recipes.patient(c, epochs=3 if smoke else 1200, epoch=1 if smoke else EPOCH)
  if dot:
    distilled = c.phases.distilled.optimizer
    distilled.name = "dot"
    del distilled.nesterov
    distilled.delta = 0.075
  return c


def _split(pair: str) -> tuple[str, str]:
  """The two names, which may have hyphens of their own."""
  names = recipes.CIFAR_NETWORKS
  for teacher in names:
    student = pair.removeprefix(f"{teacher}-")
    if student != pair and student in names:
      return teacher, student
  raise errors.UserError(
    f"got the pair {pair!r}, needs TEACHER-STUDENT, two of {', '.join(names)}"
  )
