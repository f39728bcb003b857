"""Who calls, told by certificates."""
