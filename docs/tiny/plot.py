"""Draws training.png and phases.png from the recorded metrics beside this file, and full_run.png from an evaluation.

python docs/tiny/plot.py [FOLDER]      # FOLDER: what `vpae_jax.evaluate --output` named
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

FOLDER = Path(__file__).parent
# (file, metric, title, running mean over so many records)
TRAINING = (
    ("vae", "vae/psnr", "VAE: PSNR of reconstructions, dB", 10),
    ("encoders", "encoders/loss", "encoders: contrastive loss", 10),
    ("teacher", "generator/loss", "teacher, first run: velocity error", 10),
    ("teacher2", "generator/loss", "teacher, second run: velocity error", 10),
)
ROWS = ("real", "teacher", "phase_1", "phase_2")
STEP = 49  # a frame of a contact sheet and the line beside it
PHASES = (
    ("phase1", "fake_score/loss", "phase 1: loss of the fake score", 10),
    ("phase1", "generator/dmd_grad", "phase 1: gradient of Eq. 1 at x0", 10),
    ("phase2", "held_out/kvd_", "phase 2: held-out KVD", 1),
    ("phase2", "heads/accuracy", "phase 2: accuracy of the discriminator", 10),
)


def draw(name: str, panels: tuple) -> None:
    """One row of panels, each with every metric of its file whose name starts as given."""
    figure = Figure(figsize=(3.6 * len(panels), 2.9), layout="constrained")
    for axes, (file, metric, title, window) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        records = [json.loads(line) for line in (FOLDER / f"{file}.jsonl").read_text().splitlines()]
        for key in sorted({key for record in records for key in record if key.startswith(metric)}):
            found = [(record["step"], record[key]) for record in records if key in record]
            steps, values = (np.array(column) for column in zip(*found, strict=True))
            label = key.removeprefix("held_out/kvd_").replace("_", " ")
            if window > 1:
                axes.plot(steps, values, alpha=0.3, color="C0")
                label, steps = None, steps[window - 1 :]
                values = np.convolve(values, np.full(window, 1 / window), "valid")
            axes.plot(steps, values, label=label, marker=None if window > 1 else "o")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if window == 1:
            axes.legend(fontsize=8)
    figure.savefig(FOLDER / f"{name}.png", dpi=100)


def draw_clips(samples: Path) -> None:
    """Frames 0, 4 and 8 of the first four clips: one line a row of ROWS; left text-to-video, right image-to-video."""
    lines = []
    for row in ROWS:
        cells = []
        for half in ("t2v", "i2v"):
            sheet = np.asarray(Image.open(samples / f"{row}_{half}.png"))
            for top in range(0, 4 * STEP, STEP):
                cells += [sheet[top : top + STEP - 1, left : left + STEP - 1] for left in (0, 4 * STEP, 8 * STEP)]
                cells.append(np.full((STEP - 1, 4, 3), 255, np.uint8))
            cells.append(np.full((STEP - 1, 8, 3), 255, np.uint8))
        lines += [
            np.concatenate(cells[:-2], axis=1),
            np.full((4, sum(c.shape[1] for c in cells[:-2]), 3), 255, np.uint8),
        ]
    picture = Image.fromarray(np.concatenate(lines[:-1]))
    picture.resize((3 * picture.width // 2, 3 * picture.height // 2), Image.Resampling.LANCZOS).save(
        FOLDER / "full_run.png"
    )


if __name__ == "__main__":
    draw("training", TRAINING)
    draw("phases", PHASES)
    for folder in sys.argv[1:]:
        draw_clips(Path(folder) / "samples")
