"""Making and scoring the clips of several models: rows, their clips on disk, and what becomes of them."""
