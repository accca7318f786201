"""What a run's clips are, and how they are judged."""
