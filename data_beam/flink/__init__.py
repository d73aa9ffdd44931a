"""A standalone Flink cluster on this machine, with Beam's job server in front of it."""
