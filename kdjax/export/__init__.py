"""Writes a trained network for others to load and to serve: `export`."""

from kdjax.export.command import Exported, export, main

__all__ = ["Exported", "export", "main"]
