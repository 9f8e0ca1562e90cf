"""Finetune pretrained robot policies in simulation with off-policy actor-critic RL."""

__version__ = "0.1.0"
