"""Apache Beam jobs that turn raw files into a corpus, and a corpus into token records.

Every job is a pure function of (input files, seed, settings): run twice, or over the same files
listed in another order, it writes the same bytes. Nothing here imports jax or TensorFlow.
"""
