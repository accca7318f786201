"""Metrics of generated clips, and the page that shows them."""
