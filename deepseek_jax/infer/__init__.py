"""Generation: models opened from folders, an engine with caches, sampling."""
