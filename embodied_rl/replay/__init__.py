"""Trajectory replay: a disk store, a memory cache and a sampler."""
