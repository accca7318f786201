"""Draws training.png and phases.png from the recorded metrics beside this file: python docs/tiny/plot.py"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
# (file, metric, title, running mean over so many records)
TRAINING = (
    ("vae", "vae/psnr", "VAE: PSNR of reconstructions, dB", 10),
    ("encoders", "encoders/loss", "encoders: contrastive loss", 10),
    ("teacher", "generator/loss", "teacher, first run: velocity error", 10),
    ("teacher2", "generator/loss", "teacher, second run: velocity error", 10),
)
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


if __name__ == "__main__":
    draw("training", TRAINING)
    draw("phases", PHASES)
