"""Post-training: what a base model learns from rewards, preferences and teachers."""
