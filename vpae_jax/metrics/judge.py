"""The quality of clips of any content relative to real clips: metrics from the measures of both.

    made = joined(measure(clips, with_networks=True) for clips in batches)
    Comparison(made, real, others, fps, {}, {}).scores() / .intervals() / .curves() / .each()

Per-clip measures are compared with the real clips of the same conditions, but distances between sets use other real
clips: a clip that begins with a real clip's first frame is not independent of it. Metrics whose package is not
installed (`metrics.extras`) are omitted. `docs/evaluation.md` says what each metric detects and misses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Shaped

from vpae_jax.metrics import flow, networks
from vpae_jax.metrics import latents as statistics
from vpae_jax.metrics.base import Clips, Metric
from vpae_jax.metrics.distances import FeatureScale, Kernels, features
from vpae_jax.metrics.extras import opencv
from vpae_jax.metrics.frames import color_distance, laplacian_variance
from vpae_jax.metrics.frechet import frechet_distance
from vpae_jax.metrics.intervals import Interval, half, intervals
from vpae_jax.metrics.latents import Channels
from vpae_jax.metrics.measures import change, color_drift, reduced, sharpness, speed
from vpae_jax.types import UserError

METRICS = (
    Metric("kvd", "KVD", "less", "Kernel distance to other real clips, in thousandths; about 0 for real clips."),
    Metric("fvd", "FVD", "less", "Frechet distance of I3D logits to other real clips; far above 0 for few clips."),
    Metric("kvd_i3d", "KVD, I3D", "less", "Kernel distance of I3D logits, in thousandths; about 0 for real clips."),
    Metric("sharpness", "sharpness", "real", "Mean absolute Laplacian, relative to real clips; below 1 is blur."),
    Metric("sharpness_kept", "sharpness kept", "real", "Laplacian variance of later frames, relative to the first."),
    Metric("motion", "motion", "real", "Mean speed of edges, relative to real clips; lower is stiller."),
    Metric("flow", "flow", "real", "Mean magnitude of optical flow, in % of the width per second."),
    Metric("dynamic_degree", "dynamic degree", "real", "Fraction of dynamic clips by VBench's rule, on DIS flow."),
    Metric("still", "still", "real", "Fraction of clips whose frames differ by less than half a level of 255."),
    Metric("still_flow", "still, flow", "real", "Fraction of clips with a flow below 0.5% of the width per second."),
    Metric(
        "interpolation_error",
        "interpolation error",
        "real",
        "Error of interpolating frames from their neighbours by flow, in levels of 255; jumps raise it.",
    ),
    Metric("flicker", "flicker", "real", "Difference to the next frame, warped back by the flow, in levels of 255."),
    Metric("temporal_flickering", "VBench flickering", "real", "1 - mean difference of neighbouring frames / 255."),
    Metric("color_drift", "colour drift", "real", "Relative change of the mean colour from first to last frame."),
    Metric(
        "color_distance",
        "colour distance",
        "real",
        "Largest distance from the first frame's colours, in levels of 255.",
    ),
    Metric(
        "persistence_first", "persistence, first", "real", "Cosine of each frame's AlexNet features to the first's."
    ),
    Metric("persistence_previous", "persistence, previous", "real", "The same, to the previous frame's."),
    Metric("latent_mean", "latent mean", "less", "Distance of the latent channels' means, in standard deviations."),
    Metric("latent_std", "latent spread", "real", "Standard deviation of latent channels, relative to real clips."),
)
LEAST_FRAMES = 3  # one with a neighbour on either side
STILL = 0.5  # levels of 255 between successive frames
FIRST_SIDE = 128  # minimum pixels of the shorter side to which large first frames are reduced

# Arrays with a row per clip.
Measures = Mapping[str, Shaped[np.ndarray, "..."]]


def measure(clips: Clips, with_networks: bool) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Measures clips: per-clip and per-frame numbers, features, and the first frame and the clip as reduced by
    `measures.reduced`.

    Args:
      clips: at least 3 frames.
      with_networks: whether to run I3D and AlexNet, which take seconds per clip on a CPU.

    Raises:
      UserError: clips of fewer frames, or weights of a network that cannot be read.
    """
    if clips.shape[1] < LEAST_FRAMES:
        raise UserError(
            f"clips of {clips.shape[1]} frames cannot be scored: motion needs {LEAST_FRAMES} or more; use longer clips"
        )
    small = reduced(clips)
    found = {
        "features": features(small),
        "sharpness": sharpness(reduced(clips, side=max(clips.shape[2:4]))),
        "speed": speed(small),
        "change": change(small),
        "color_drift": color_drift(clips),
        "laplacian": laplacian_variance(clips),
        "color": color_distance(clips),
        "steps": np.stack([change(clips[:, i : i + 2]) for i in range(clips.shape[1] - 1)], 1),
        "first": reduced(clips[:, :1], side=FIRST_SIDE)[:, 0],
        "clip": small,
    }
    if opencv() is not None:
        found |= flow.measure(clips)
    if with_networks:
        more = {"i3d": networks.video_features(clips), "content": networks.content(clips)}
        found |= {name: value for name, value in more.items() if value is not None}
    return found


@dataclass(frozen=True)
class Comparison:
    """Generated clips to be scored, and real ones.

    Attributes:
      made: measures of the clips to be scored, optionally with `moments` of their latents.
      real: measures of the real clips of their conditions, row by row; of any number if real clips are scored.
      others: measures of the reference clips, other real ones, at least two; without them there are no distances.
      fps: frames per second.
      more: further per-clip values, by metric, whose mean is reported.
      pairs: by metric, values for the first conditions (the difference between two clips of a condition) and for real
        clips, whose ratio of means is reported (`diversity`).
      kernels: kernel values between these clips and the others, by metric, if known already, as for a subset.
    """

    made: Measures
    real: Measures
    others: Measures
    fps: float
    more: Measures
    pairs: Mapping[str, tuple[Float[np.ndarray, "n"], Float[np.ndarray, "m"]]]
    kernels: Mapping[str, Kernels] = field(default_factory=dict)

    def each(self) -> dict[str, Float[np.ndarray, "b"]]:
        """Per-clip values, by metric. The score is their mean over clips, except for `sharpness_kept`, whose score is a
        ratio of means. `still`, `still_flow` and `dynamic_degree` are 0 or 1."""
        made, real = self.made, self.real
        later, first = made["laplacian"][:, 1:].mean(1), made["laplacian"][:, 0]
        found = {
            "sharpness": made["sharpness"] / _mean(real["sharpness"]),
            # A uniform frame, as in a clip that begins with black, has no sharpness to keep: values below 1 count as 1.
            "sharpness_kept": np.maximum(later, 1) / np.maximum(first, 1),
            "motion": made["speed"] / _mean(real["speed"]),
            "still": (made["change"] < STILL).astype(np.float64),
            "temporal_flickering": 1 - made["steps"].mean(1) / 255,
            "color_drift": made["color_drift"],
            "color_distance": made["color"].max(1),
        }
        if "magnitude" in made:
            found |= {
                "flow": 100 * self.fps * made["magnitude"].mean(1),
                "dynamic_degree": flow.dynamic(made["fastest"], self.fps),
                "still_flow": flow.still(made["magnitude"], self.fps),
                "interpolation_error": made["interpolated"].mean(1),
                "flicker": made["compensated"].mean(1),
            }
        if "content" in made:
            found |= persistence(made["content"])
        return {**found, **self.more}

    def scores(self) -> dict[str, float]:
        """Every score that the measures allow."""
        made, real = self.made, self.real
        found = {name: float(values.mean()) for name, values in self.each().items()}
        found |= {
            **self._distances(),
            "sharpness_kept": over(made["laplacian"][:, 1:], made["laplacian"][:, 0]),
        }
        if "moments" in made:
            channels = Channels.of(made["moments"]), Channels.of(real["moments"])
            found |= {"latent_mean": statistics.shift(*channels), "latent_std": statistics.spread(*channels)}
        return found | {name: over(*pair) for name, pair in self.pairs.items() if len(pair[0])}

    def _distances(self) -> dict[str, float]:
        if not self.others:
            return {}
        found = {name: kernels.distance for name, kernels in (self.kernels or self._kernels()).items()}
        return found | ({"fvd": frechet_distance(self.made["i3d"], self.others["i3d"])} if "i3d" in self.made else {})

    def _kernels(self) -> dict[str, Kernels]:
        """Kernel values by metric, of features standardised by the reference clips."""
        found = {}
        for metric, name in {"kvd": "features", "kvd_i3d": "i3d"}.items():
            if self.others and name in self.made:
                scale = FeatureScale.of(self.others[name])
                found[metric] = Kernels.of(scale(self.made[name]), scale(self.others[name]))
        return found

    def intervals(self) -> dict[str, Interval]:
        """95% intervals over clips (`metrics.intervals`); a generated clip and its real one are drawn together."""
        whole = replace(self, kernels=self._kernels())
        return intervals(whole.scores(), len(self.made["features"]), lambda rng: whole._half(rng).scores())

    def _half(self, rng: np.random.Generator) -> Comparison:
        made, real = len(self.made["features"]), len(self.real["features"])
        rows = half(made, rng)
        other = half(len(self.others["features"]), rng) if self.others else rows
        true = rows if made == real else half(real, rng)

        def pick(pair: tuple[Float[np.ndarray, "n"], Float[np.ndarray, "m"]]) -> tuple[np.ndarray, np.ndarray]:
            apart, true_apart = pair
            return apart[rows[rows < len(apart)]], true_apart[true]

        needed = {*self.made} - {"first", "clip", "features"}
        return replace(
            self,
            made={name: self.made[name][rows] for name in needed},
            real={name: self.real[name][true] for name in needed & {"features", "sharpness", "speed", "moments"}},
            others={name: self.others[name][other] for name in {"i3d"} & {*self.others}} or self.others,
            kernels={name: kernels.subset(rows, other) for name, kernels in self.kernels.items()},
            more={name: values[rows] for name, values in self.more.items()},
            pairs={name: pick(pair) for name, pair in self.pairs.items()},
        )

    def curves(self) -> dict[str, list[float]]:
        """Per-frame means over clips, which reveal defects after the first frame: for every frame (`sharpness_kept`,
        `color_distance`, `persistence_first`), for all but the first (`temporal_flickering`, `flow`, `flicker`,
        `persistence_previous`), or for all but the first and the last (`interpolation_error`)."""
        made = self.made
        found = {
            "sharpness_kept": made["laplacian"].mean(0) / _mean(made["laplacian"][:, 0]),
            "color_distance": made["color"].mean(0),
            "temporal_flickering": 1 - made["steps"].mean(0) / 255,
        }
        if "magnitude" in made:
            found |= {
                "flow": 100 * self.fps * made["magnitude"].mean(0),
                "flicker": made["compensated"].mean(0),
                "interpolation_error": made["interpolated"].mean(0),
            }
        if "content" in made:
            to_first, to_previous = _cosines(made["content"])
            found |= {"persistence_first": to_first.mean(0), "persistence_previous": to_previous.mean(0)}
        return {name: [float(value) for value in values] for name, values in found.items()}


def persistence(content: Float[np.ndarray, "b t d"]) -> dict[str, Float[np.ndarray, "b"]]:
    """For each clip, the mean cosine of its later frames to the first and to the previous frame (like VBench's subject
    and background consistency, which use features of DINO and CLIP); 1 for a static clip."""
    to_first, to_previous = _cosines(content)
    return {"persistence_first": to_first[:, 1:].mean(1), "persistence_previous": to_previous.mean(1)}


def _cosines(content: Float[np.ndarray, "b t d"]) -> tuple[Float[np.ndarray, "b t"], Float[np.ndarray, "b later"]]:
    """Cosines of each frame's features (unit length) to the first frame's, and of all but the first to the previous."""
    return (content * content[:, :1]).sum(-1), (content[:, 1:] * content[:, :-1]).sum(-1)


def over(made: Float[np.ndarray, "..."], real: Float[np.ndarray, "..."]) -> float:
    """The ratio of two means."""
    return float(made.mean() / _mean(real))


def _mean(values: Float[np.ndarray, "..."]) -> float:
    """The mean, bounded below for use as a divisor, since real clips may have no edges."""
    return max(float(values.mean()), 1e-6)
