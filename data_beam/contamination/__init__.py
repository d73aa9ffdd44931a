"""Overlap of training text with evaluation sets: their readers, the index, the report."""
