"""Sources of clips, the tokenizer of the tiny captions, cached latents, and batch iterators."""
