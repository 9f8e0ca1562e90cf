"""Backbones: observations to features and a base action."""
