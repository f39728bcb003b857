"""Measures druvarpc, gRPC and bare TCP over long links; see ../README.md."""
