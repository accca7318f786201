"""The README's Python runs as it is printed, but for the names of files."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image

from vpae_jax.inference.loading import load_pipeline
from vpae_jax.weights.find import find_model
from vpae_jax.weights.layout import Contents, write_model
from vpae_jax.weights.locate import embedded_model
from vpae_jax.weights.settings import Scheduler

ROOT = Path(__file__).parent.parent
STUDENT = "runs/demo/phase2/model"


def snippet(word):
    """The README's one block of Python that has this word."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return found


def test_a_student_makes_its_clip_in_diffusers(tmp_path, monkeypatch):
    student = tmp_path / STUDENT
    write_model(student, Contents(find_model(embedded_model()), scheduler=Scheduler("euler", 1.0, 1, 1.0)))
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    code = snippet("from diffusers import DiffusionPipeline").replace("pipe(", "pipe(latents=latents, ")
    # By itself transformers computes in the bfloat16 that the tiny encoders are stored in.
    code = code.replace(f'"{STUDENT}"', f'"{STUDENT}", dtype=torch.float32')
    latents = torch.randn(1, 16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    made = {"latents": latents, "torch": torch}
    exec(code, made)
    frames = np.stack([np.asarray(frame) for frame in made["frames"]]).astype(int)
    assert frames.shape == (9, 48, 48, 3) and (tmp_path / "out.gif").stat().st_size > 0
    prompt = re.search(r'prompt="(.*?)"', code)[1]
    picture = np.asarray(Image.open(ROOT / "docs" / "tiny" / "first_frame.png"))
    ours = load_pipeline(student)(prompt, picture, noise=jnp.asarray(latents.permute(0, 2, 3, 4, 1).numpy()))
    assert np.abs(ours - frames).max() <= 1


def test_our_own_snippet():
    made = {}
    exec(snippet("vpae_jax.load_pipeline").replace("seed=0", "seed=0, steps=1"), made)
    assert made["frames"].shape == (9, 48, 48, 3) and made["frames"].dtype == np.uint8
