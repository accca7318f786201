"""Public benchmarks, each run from its own checkout: what they ask of a model, and what their scores add up to."""
