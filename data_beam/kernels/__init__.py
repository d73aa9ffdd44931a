"""Vectorised numpy kernels: tokens, MinHash signatures, text statistics."""
