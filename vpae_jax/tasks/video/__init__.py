"""The task for clips of any content, given as folders of latent records, or as videos that are encoded before a run."""
