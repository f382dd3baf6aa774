"""Layers: one linen module a layer that holds parameters, the maths beside it as free functions of arrays."""
