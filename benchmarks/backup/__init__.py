"""The reference backup beside restic and borg. See ../README.md."""
