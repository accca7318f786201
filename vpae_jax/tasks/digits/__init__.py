"""The embedded task: moving handwritten digits."""
