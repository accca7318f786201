"""From a model directory to videos."""
