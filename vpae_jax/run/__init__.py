"""One training run, from its config to what it leaves behind."""
