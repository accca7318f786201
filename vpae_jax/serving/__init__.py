"""The page that makes clips from prompts: limits, queue, worker, and the HTTP server (`python -m vpae_jax.serve`)."""
