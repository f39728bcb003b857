"""The version of druvarpc."""

__version__ = "0.1.0"
