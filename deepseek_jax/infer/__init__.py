"""Generation. A plain sampler for now: every token runs the whole sequence again."""
