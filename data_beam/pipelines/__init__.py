"""Whole jobs, each with a `run` that a stage of an experiment or the command line calls."""
