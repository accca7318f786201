"""Model directories and other formats of weights: one table a part, both directions."""
