"""The processes of a run: how they find each other, which one writes, when to stop."""
