"""Runs the benchmarks that need nothing but this machine."""

from .loss import main

main()
