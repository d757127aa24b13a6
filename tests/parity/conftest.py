"""PyTorch and transformers are imported, for seconds, only if asked for."""


def pytest_ignore_collect(config):
  return True if "not parity" in config.option.markexpr else None
