"""ADD with a discriminator on pixels, as in the ADD paper (2311.17042); in latents it is `configs/add.py`.

    python -m vpae_jax.main --config=configs/add_pixels.py --workdir=runs/tiny/add_pixels           # tiny, CPU, 4 steps
    python -m vpae_jax.main --config=configs/add_pixels.py:i2v-14b-720p --workdir=... --config.model.path=... \\
        --config.data.records=...

ADD reads decoded images with DINOv2, and conditions its heads on prompt and image. Here the encoder is the CLIP tower
of the model directory; a text-to-video model names another directory that has one (--config.model.image_encoder=...).
The heads are 1x1 convolutions at four evenly spaced depths, as in StyleGAN-T, and are not conditioned. Clips are shown
without noise. Everything else is as in `configs/add.py`.
"""

from ml_collections import ConfigDict

from vpae_jax.configs import add
from vpae_jax.configs.common import with_pixel_discriminator


def get_config(preset: str = "tiny") -> ConfigDict:
    return with_pixel_discriminator(add.get_config(preset))
