"""V-PAE's phase two with a discriminator on pixels: ADD's choice (2311.17042) in place of the generator's average.

    python -m vpae_jax.main --config=configs/phase2_pixels.py --workdir=runs/tiny/phase2_pixels      # tiny, CPU
    python -m vpae_jax.main --config=configs/phase2_pixels.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

Starts from phase one's checkpoint, by default in the folder `phase1` next to this run's workdir. A few frames of every
clip are decoded and read by the model directory's own image encoder; a text-to-video model names another directory that
has one (--config.model.image_encoder=...). Clips are shown without noise. The heads attend to four depths of the
encoder ("ca", since it reads no prompt). Everything else is as in `configs/phase2.py`.
"""

from ml_collections import ConfigDict

from vpae_jax.configs import phase2
from vpae_jax.configs.common import with_pixel_discriminator


def get_config(preset: str = "tiny") -> ConfigDict:
    return with_pixel_discriminator(phase2.get_config(preset))
