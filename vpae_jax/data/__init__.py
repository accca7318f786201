"""Latent records, and batches made of them."""
