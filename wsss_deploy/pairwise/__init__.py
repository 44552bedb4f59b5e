"""The one pairwise operator."""
