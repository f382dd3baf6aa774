"""Exchange of published checkpoints: safetensors in Hugging Face's layout, read and written."""
