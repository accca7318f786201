"""How good generated clips of moving digits are, on digits that no training saw.

Clips are asked for with the captions, and for image-to-video the first frames, of real held-out clips. Each half is
scored by METRICS. The real clips themselves are scored in the same way: that is the floor (or the ceiling) of every
number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from einops import reduce
from jaxtyping import Float, Int
from scipy.ndimage import affine_transform
from sklearn.svm import SVC

from vpae_jax.metrics.base import Clips, Metric, Pictures, Predict, Request
from vpae_jax.metrics.distances import FeatureScale, features, kernel_distance
from vpae_jax.tasks.digits import measures
from vpae_jax.tasks.digits.clips import MovingDigits
from vpae_jax.types import UserError

HALVES = ("t2v", "i2v")
METRICS = (
    Metric("kvd", "KVD", "less", "Kernel distance to other real clips, in thousandths; about 0 for real clips."),
    Metric("digit_first", "digit, first", "more", "Share of clips whose first frame shows the caption's digit."),
    Metric("digit_last", "digit, last", "more", "Share of clips whose last frame shows the caption's digit."),
    Metric("direction", "direction", "more", "Share of clips that set out in the caption's direction."),
    Metric("sharpness", "sharpness", "real", "Mean absolute Laplacian over that of real clips; blur is below 1."),
    Metric("diversity", "diversity", "real", "Difference of two clips of one condition, over their ink, 0 to 1."),
    Metric("motion", "motion", "real", "Mean displacement of the digit over that of real clips."),
    Metric("motion_spread", "motion spread", "real", "Spread of that displacement over that of real clips."),
    Metric("color_drift", "colour drift", "real", "Relative change of the mean colour from first to last frame."),
    Metric("psnr_first", "PSNR, frame 0", "more", "First frame against the given picture, in decibels."),
)
# Fixed, so that numbers compare between runs; the clips that are asked for, and those that they are compared with.
ASKED_SEED, REFERENCE_SEED, CLASSIFIER_SEED = 100, 200, 300
REFERENCE_CLIPS = 1000
CLASSIFIER_CLIPS = 2000
DIVERSITY_CLIPS = 64
MINIMUM_CLIPS = 16


class DigitClassifier:
    """Names the digit in a frame: a support vector machine on gradient histograms of the upright, centred digit.

    Fitted on the first and last frames of clips of the classifier's own digit images, which are neither trained on nor
    evaluated; deterministic, a few seconds. About 97 % right on held-out frames.
    """

    def __init__(self, clips: int = CLASSIFIER_CLIPS, seed: int = CLASSIFIER_SEED) -> None:
        source = MovingDigits("classifier", clips, seed)
        items = [source[i] for i in range(clips)]
        frames = np.concatenate([np.stack([item["video"][i] for item in items]) for i in (0, -1)])
        labels = np.array([item["digit"] for item in items] * 2)
        self._machine = SVC(C=10.0, gamma="scale").fit(_describe(frames), labels)

    def __call__(self, frames: Pictures) -> Int[np.ndarray, "b"]:
        """The most likely class, 0-9, of each frame."""
        return self._machine.predict(_describe(frames))


class DigitEvaluation:
    """Scores a generator of moving digits.

    Args:
      count: clips a half, at least MINIMUM_CLIPS.
      halves: "t2v" and "i2v", or one of them.
      classifier: fitted on construction when not given.

    Raises:
      UserError: too few clips to say anything.
    """

    def __init__(self, count: int, halves: Sequence[str] = HALVES, classifier: DigitClassifier | None = None) -> None:
        if count < MINIMUM_CLIPS:
            raise UserError(f"count is {count}: scores need at least {MINIMUM_CLIPS} clips")
        asked = MovingDigits("eval", count, ASKED_SEED)
        reference = MovingDigits("eval", REFERENCE_CLIPS, REFERENCE_SEED)
        self.halves = tuple(halves)
        self.items = [asked[i] for i in range(count)]
        self.clips = np.stack([item["video"] for item in self.items])
        self.classifier = DigitClassifier() if classifier is None else classifier
        self._digits = np.array([item["digit"] for item in self.items])
        self._directions = np.array([item["direction"] for item in self.items])
        others = [reference[i] for i in range(REFERENCE_CLIPS)]
        reference_clips = np.stack([item["video"] for item in others])
        raw = features(reference_clips)
        self._scale = FeatureScale.of(raw)
        self._reference = self._scale(raw)
        self._sharpness = float(measures.sharpness(self.clips).mean())
        moved = measures.displacement(self.clips)
        self._motion, self._spread = float(moved.mean()), float(moved.std())
        # A real partner for each of the first clips: another digit image and start, the same caption but for its
        # phrasing. What follows a first frame is drawn once in real data, so image-to-video has no such pair.
        same: dict[tuple[int, int], int] = {(o["digit"], o["direction"]): i for i, o in enumerate(others)}
        pairs = [(i, same.get((o["digit"], o["direction"]))) for i, o in enumerate(self.items[:DIVERSITY_CLIPS])]
        found = [(i, j) for i, j in pairs if j is not None]
        self._pairs = self.clips[[i for i, _ in found]], reference_clips[[j for _, j in found]]

    def request(self, half: str, seed: int = 0, count: int | None = None) -> Request:
        """The conditions of the first `count` clips (all by default)."""
        items = self.items[:count]
        pictures = np.stack([item["video"][0] for item in items]) if half == "i2v" else None
        return Request([item["caption"] for item in items], pictures, seed)

    def run(self, predict: Predict) -> Iterator[tuple[str, float]]:
        """Generates and scores; names are `half/metric`."""
        for half in self.halves:
            made = predict(self.request(half))
            again = predict(self.request(half, seed=1, count=DIVERSITY_CLIPS))
            yield from self.scores(half, made)
            yield f"{half}/diversity", float(measures.difference(made[: len(again)], again).mean())

    def real(self) -> Iterator[tuple[str, float]]:
        """The same scores of the real clips whose captions and first frames are asked for."""
        for half in self.halves:
            yield from self.scores(half, self.clips)
            if half == "t2v":
                yield "t2v/diversity", float(measures.difference(*self._pairs).mean())

    def scores(self, half: str, clips: Clips) -> Iterator[tuple[str, float]]:
        """All metrics of one set of clips, made for the conditions in their order.

        Raises:
          UserError: clips of another number or size than the real ones.
        """
        if clips.shape != self.clips.shape:
            raise UserError(f"clips are {clips.shape}, expected {self.clips.shape}: this model makes other videos")
        moved = measures.displacement(clips)
        values = {
            "digit_first": (self.classifier(clips[:, 0]) == self._digits).mean(),
            "digit_last": (self.classifier(clips[:, -1]) == self._digits).mean(),
            "direction": (measures.directions(clips) == self._directions).mean(),
            "sharpness": measures.sharpness(clips).mean() / self._sharpness,
            "motion": moved.mean() / self._motion,
            "motion_spread": moved.std() / self._spread,
            "color_drift": measures.color_drift(clips).mean(),
            "kvd": kernel_distance(self._scale(features(clips)), self._reference),
        }
        if half == "i2v":
            values["psnr_first"] = measures.psnr(clips[:, 0], self.clips[:, 0]).mean()
        for name, value in values.items():
            yield f"{half}/{name}", float(value)


SIDE, CELL, BINS = 28, 7, 8
# Root mean square height of the normalised digit, in pixels of SIDE.
SPREAD = 5.0


def _describe(frames: Pictures) -> Float[np.ndarray, "b d"]:
    """Gradient histograms of the normalised digits, over cells and half-shifted cells; each vector has length 1."""
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
    """The digit centred, at one size and without slant, by its first and second moments; an empty frame stays empty."""
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
