"""Public benchmarks, each run from its own checkout: the clips that they require, and their aggregate scores."""
