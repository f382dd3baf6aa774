"""Blocks, the whole model, multi-token prediction, and the registry of every member."""
