"""Paired measurements against named peers; ``python -m benchmarks`` runs those that need no data."""
