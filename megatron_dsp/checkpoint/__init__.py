"""Checkpoints on the disk: a folder of them, what each consists of, and what may be unpickled (docs/checkpoints.md)."""
