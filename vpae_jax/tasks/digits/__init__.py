"""Moving handwritten digits, the embedded task."""
