"""Processes: how they find each other, who writes, when to stop."""
