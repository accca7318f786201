"""From videos and captions to latent records."""
