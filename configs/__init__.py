"""The bundled configs: one file for each method. In a checkout this folder is `configs/`."""
