"""How a decoder lies on a mesh."""

# The layers are stacked: their first axis is the depth, which splits nothing.
# Along `model` the heads and neurons are split, and so each matrix product's
# inner sum is taken once in the attention and once in the MLP (Shoeybi et al.
# 2019, arXiv 1909.08053, section 3). Along `fsdp` every kernel is split by its
# rows: a gradient split by its columns is summed whole on TPUs, and then cut.
PARTITION = (
  (r"(query|key|value|gate|up)/kernel$", (None, "fsdp", "model")),
  (r"(output|down)/kernel$", (None, ("model", "fsdp"), None)),
  (r"(query|key|value|gate|up)/bias$", (None, "model")),
  (r"(embed|head)/kernel$", ("model", "fsdp")),
  (r"positions/kernel$", (None, "fsdp")),
  (r"lora_in$", (None, "fsdp", None)),
  (r"lora_out$", (None, None, "fsdp")),
)
