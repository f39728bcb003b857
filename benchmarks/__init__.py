"""Measures druvarpc beside its peers; see README.md."""
