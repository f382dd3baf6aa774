"""Hot ops. One folder an op: `reference.py` is the meaning, the other files are routes, the package function picks."""
