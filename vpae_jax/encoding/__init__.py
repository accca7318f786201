"""Encodes videos and captions into latent records."""
