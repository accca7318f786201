"""Wan models in Flax NNX, equal to those of diffusers and transformers."""
