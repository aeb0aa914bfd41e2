"""Compress a passage into the keys and values of a few memory tokens of a frozen language model."""

__version__ = "0.1.0"
