"""Files in and out: what to read, how to read it, deterministic shards."""
