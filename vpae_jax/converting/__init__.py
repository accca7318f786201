"""What `vpae_jax.convert` is made of besides the files of `weights/`: its command line, and the upload to the hub."""
