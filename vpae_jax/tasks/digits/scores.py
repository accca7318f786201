"""Scores of generated clips of moving digits, on held-out digits.

Clips are generated for the captions, and in image-to-video the first frames, of real held-out clips. The real clips
themselves are scored in the same way, which gives the best value that each score can reach.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import reduce
from jaxtyping import Float, Int
from scipy.ndimage import affine_transform
from sklearn.svm import SVC

from vpae_jax.metrics.base import Clips, Metric, Pictures
from vpae_jax.metrics.distances import FeatureScale, Kernels, features
from vpae_jax.metrics.frames import color_distance, laplacian_variance
from vpae_jax.metrics.intervals import Interval, half
from vpae_jax.metrics.intervals import intervals as resampled
from vpae_jax.metrics.measures import color_drift, psnr, sharpness
from vpae_jax.tasks.base import Measures, rows_of
from vpae_jax.tasks.digits import measures
from vpae_jax.tasks.digits.clips import Clip, MovingDigits
from vpae_jax.types import UserError

METRICS = (
    Metric("kvd", "KVD", "less", "Kernel distance to other real clips, in thousandths; about 0 for real clips."),
    Metric("digit_first", "digit, first", "more", "Fraction of clips whose first frame shows the caption's digit."),
    Metric("digit_last", "digit, last", "more", "Fraction of clips whose last frame shows the caption's digit."),
    Metric("direction", "direction", "more", "Fraction of clips that move in the caption's direction at first."),
    Metric("sharpness", "sharpness", "real", "Mean absolute Laplacian relative to real clips; blur is below 1."),
    Metric("diversity", "diversity", "real", "Difference of two clips of one condition, over their ink, 0 to 1."),
    Metric("motion", "motion", "real", "Mean displacement of the digit relative to real clips."),
    Metric("motion_spread", "motion spread", "real", "Spread of that displacement relative to real clips."),
    Metric("color_drift", "colour drift", "real", "Relative change of the mean colour from first to last frame."),
    Metric("psnr_first", "PSNR, frame 0", "more", "First frame against the given image, in decibels."),
)
# A student is rejected if its digits move less than this fraction of the real ones' motion, and less than before.
LEAST = {"motion": 0.5}
CLASSIFIER_CLIPS, CLASSIFIER_SEED = 2000, 300
PAIRS = 64  # pairs of real clips, to measure their diversity


class DigitClassifier:
    """Classifies the digit in a frame, with a support vector machine on gradient histograms of the normalised digit.

    It is fitted on first and last frames of clips of the classifier's own digit images, which are used neither for
    training nor for evaluation. This is deterministic and takes a few seconds. Accuracy on held-out frames: about 97%.
    """

    def __init__(self, clips: int = CLASSIFIER_CLIPS, seed: int = CLASSIFIER_SEED) -> None:
        source = MovingDigits("classifier", clips, seed)
        items = [source[i] for i in range(clips)]
        frames = np.concatenate([np.stack([item["video"][i] for item in items]) for i in (0, -1)])
        labels = np.array([item["digit"] for item in items] * 2)
        self._machine = SVC(C=10.0, gamma="scale").fit(_describe(frames), labels)

    def __call__(self, frames: Pictures) -> Int[np.ndarray, "b"]:
        """Returns the most likely class, 0-9, of each frame."""
        return self._machine.predict(_describe(frames))


@functools.cache
def classifier() -> DigitClassifier:
    """Returns the classifier, which is shared by all evaluations in this process."""
    return DigitClassifier()


def measure(clips: Clips) -> Measures:
    """Measures clips. They are small, so they are kept completely."""
    return {"clips": clips, "features": features(clips)}


def measure_real(items: Sequence[Clip]) -> Measures:
    """Measures real clips, and adds their digits and directions."""
    known = {name: np.array([item[name] for item in items]) for name in ("digit", "direction")}
    return {**measure(np.stack([item["video"] for item in items])), **known}


def against_real(made: Measures, real: Measures, others: Measures) -> dict[str, float]:
    """Returns all metrics that need neither the classifier nor two clips of one condition.

    Args:
      made: measurements of the clips to score.
      real: measurements of the real clips of their conditions.
      others: measurements of other real clips.

    Raises:
      UserError: the clips have another size than the real ones.
    """
    if made["clips"].shape != real["clips"].shape:
        expected = real["clips"].shape
        raise UserError(f"clips are {made['clips'].shape}, expected {expected}: this model makes other videos")
    return _summary(_numbers(made, real), _kernels(made, others))


def _numbers(made: Measures, real: Measures) -> Measures:
    """Returns the values of single clips, and of the real ones of their conditions."""
    clips, true = made["clips"], real["clips"]
    return {
        "direction": measures.directions(clips) == real["direction"],
        "sharpness": sharpness(clips),
        "sharpness_real": sharpness(true),
        "moved": measures.displacement(clips),
        "moved_real": measures.displacement(true),
        "color_drift": color_drift(clips),
    }


def _kernels(made: Measures, others: Measures) -> Kernels:
    """Returns the kernels between the features of clips and of other real ones, which standardise both."""
    scale = FeatureScale.of(others["features"])
    return Kernels.of(scale(made["features"]), scale(others["features"]))


def _summary(numbers: Measures, kernels: Kernels) -> dict[str, float]:
    """Returns the metrics of clips with these values and kernels."""
    moved, really = numbers["moved"], numbers["moved_real"]
    return {
        "kvd": kernels.distance,
        "direction": float(numbers["direction"].mean()),
        "sharpness": float(numbers["sharpness"].mean() / numbers["sharpness_real"].mean()),
        "motion": float(moved.mean() / really.mean()),
        "motion_spread": float(moved.std() / really.std()),
        "color_drift": float(numbers["color_drift"].mean()),
    }


def intervals(
    made: Measures, again: Measures, real: Measures, others: Measures, named: bool, given: bool
) -> dict[str, Interval]:
    """Returns 95% confidence intervals over clips (`metrics.intervals`).

    Args:
      made, again: measurements of the clips, and of the second clips for the first conditions.
      real, others: measurements of the real clips of the conditions, and of other real clips.
      named: whether to classify the digits.
      given: whether the first frame was given.
    """
    single = {}
    if named:
        for when, frame in (("first", 0), ("last", -1)):
            single[f"digit_{when}"] = classifier()(made["clips"][:, frame]) == real["digit"]
    if given:
        single["psnr_first"] = psnr(made["clips"][:, 0], real["clips"][:, 0])
    second = again["clips"]
    apart = measures.difference(made["clips"][: len(second)], second)
    numbers, kernels = _numbers(made, real), _kernels(made, others)

    def found(rows: Any, other: Any) -> dict[str, float]:
        values = _summary(rows_of(numbers, rows), kernels.subset(rows, other))
        values |= {name: float(value[rows].mean()) for name, value in single.items()}
        pairs = apart[rows[rows < len(apart)]]
        return values | ({"diversity": float(pairs.mean())} if len(pairs) else {})

    count, more = len(made["features"]), len(others["features"])
    whole = found(np.arange(count), np.arange(more))
    return resampled(whole, count, lambda rng: found(half(count, rng), half(more, rng)))


def curves(made: Measures) -> dict[str, list[float]]:
    """Returns means over clips, frame by frame: the Laplacian's variance relative to the first frame, and the distance
    of the colours from those of the first frame."""
    variance = laplacian_variance(made["clips"]).mean(0)
    return {
        "sharpness_kept": (variance / max(variance[0], 1e-6)).tolist(),
        "color_distance": color_distance(made["clips"]).mean(0).tolist(),
    }


def each(made: Measures, real: Measures, given: bool) -> dict[str, list[float]]:
    """Returns the metrics of single clips; `given` says whether the first frame was given."""
    numbers = _numbers(made, real)
    found = {
        "direction": numbers["direction"].astype(float),
        "sharpness": numbers["sharpness"] / numbers["sharpness_real"].mean(),
        "motion": numbers["moved"] / numbers["moved_real"].mean(),
        "color_drift": numbers["color_drift"],
    }
    if given:
        found["psnr_first"] = psnr(made["clips"][:, 0], real["clips"][:, 0])
    return {name: values.tolist() for name, values in found.items()}


def digits_named(made: Measures, real: Measures) -> dict[str, float]:
    """Returns how often the classifier sees the caption's digit in the first and in the last frame."""
    name = classifier()
    return {
        f"digit_{when}": float((name(made["clips"][:, frame]) == real["digit"]).mean())
        for when, frame in (("first", 0), ("last", -1))
    }


def agreement(made: Measures, real: Measures) -> float:
    """Returns the PSNR of the first frames against the given ones."""
    return float(psnr(made["clips"][:, 0], real["clips"][:, 0]).mean())


def diversity(made: Measures, again: Measures) -> float:
    """Returns the difference between clips and those for the same conditions with other noise."""
    second = again["clips"]
    return float(measures.difference(made["clips"][: len(second)], second).mean())


def real_diversity(real: Measures, others: Measures) -> float | None:
    """Returns the same for pairs of real clips with one digit and direction but different images and starts; None if
    there are no pairs."""
    known = zip(others["digit"].tolist(), others["direction"].tolist(), strict=True)
    same = {key: i for i, key in enumerate(known)}
    keys = zip(real["digit"].tolist(), real["direction"].tolist(), strict=True)
    pairs = [(i, same[key]) for i, key in enumerate(keys) if key in same][:PAIRS]
    if not pairs:
        return None
    first, second = np.array(pairs).T
    return float(measures.difference(real["clips"][first], others["clips"][second]).mean())


SIDE, CELL, BINS = 28, 7, 8
# Root mean square height of the normalised digit, in pixels (of SIDE).
SPREAD = 5.0


def _describe(frames: Pictures) -> Float[np.ndarray, "b d"]:
    """Returns gradient histograms of the normalised digits, over cells and half-shifted cells; all vectors have length
    1."""
    x = np.stack([_normalise(frame) for frame in frames.mean(-1)])
    down, right = np.gradient(x, axis=1), np.gradient(x, axis=2)
    edge = np.hypot(down, right)
    angle = (np.arctan2(down, right) / (2 * np.pi) * BINS) % BINS
    away = np.abs(angle[..., None] - np.arange(BINS))
    oriented = np.maximum(0, 1 - np.minimum(away, BINS - away)) * edge[..., None]
    parts = []
    for first, cells in ((0, SIDE // CELL), (CELL // 2, SIDE // CELL - 1)):
        last = first + cells * CELL
        pattern = "b (rows r) (columns c) bins -> b (rows columns bins)"
        parts.append(reduce(oriented[:, first:last, first:last], pattern, "sum", r=CELL, c=CELL))
    values = np.concatenate(parts, 1)
    return np.sqrt(values / np.maximum(values.sum(1, keepdims=True), 1e-6))


def _normalise(frame: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "28 28"]:
    """Normalises the digit's position, size and slant by its first and second moments; an empty frame stays empty."""
    ink = np.maximum(frame.astype(np.float64) - measures.INK, 0)
    total = max(ink.sum(), 1e-6)
    rows, columns = np.arange(frame.shape[0]), np.arange(frame.shape[1])
    centre = np.array([(ink.sum(1) @ rows), (ink.sum(0) @ columns)]) / total
    y, x = rows - centre[0], columns - centre[1]
    yy, xx, yx = ink.sum(1) @ y**2 / total, ink.sum(0) @ x**2 / total, y @ ink @ x / total
    slant = float(np.clip(yx / max(yy, 1e-3), -1.5, 1.5))
    size = np.sqrt(max(yy, xx - slant * yx) + 0.1) / SPREAD
    back = size * np.array([[1, 0], [slant, 1]])
    offset = centre - back @ np.full(2, (SIDE - 1) / 2)
    return affine_transform(ink, back, offset, output_shape=(SIDE, SIDE), order=1)
