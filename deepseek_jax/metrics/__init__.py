"""What a run says about itself: metric lines, progress, pictures, the manifest. Light to import: jax and matplotlib
come in where they are used."""

from deepseek_jax.metrics.manifest import write_manifest
from deepseek_jax.metrics.plots import loss_curve, router_heatmap
from deepseek_jax.metrics.progress import Progress
from deepseek_jax.metrics.writer import JsonlWriter, read_jsonl

__all__ = ["JsonlWriter", "Progress", "loss_curve", "read_jsonl", "router_heatmap", "write_manifest"]
