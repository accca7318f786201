"""Clips of any content, as folders of latent records or as videos that are encoded before a run."""
