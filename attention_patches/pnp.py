"""Plug-and-Play diffusion features (Tumanyan et al., CVPR 2023) as edits of a MODEL.

Section 4 of the paper: during the first part of the run, the residual branch of one decoder ResBlock (spatial features f)
and the self-attention maps of several decoder layers (through q and k) are the source's; everything else is the target's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from . import host
from .blocks import Point, attention_points, feature_points, unet_layers
from .edit import Edit, SourceRows
from .negative import SCHEDULES, NegativeBlend
from .reference_pass import add_edits
from .rewrites import source_features, source_self_attention
from .source import Source, check_conditioning

BRANCH = "source"  # the same name in every edit of one source, so that they share its pass


def step_count(sigmas: Tensor, fraction: float) -> int:
    """How many of the first steps a fraction of the run means: int(T f), as in the authors' diffusers code.

    sigmas: [K] ascending, T = K - 1 steps. The small term undoes rounding: 0.29 of 100 steps is 29.
    """
    return int((len(sigmas) - 1) * fraction + 1e-9)


def window_floor(sigmas: Tensor, fraction: float) -> float:
    """Noise level down to which (excluded) the first `fraction` of a run is active.

    A threshold on sigma and not a count of steps: samplers that see only a part of the schedule, or ask in between,
    then agree. inf: never active, -inf: always.
    """
    count = step_count(sigmas, fraction)
    if count <= 0:
        return math.inf
    if count >= len(sigmas) - 1:
        return -math.inf
    return float(sigmas[len(sigmas) - 1 - count])


def in_window(sigma: float, floor: float) -> bool:
    """Whether a noise level lies above the floor of a window, beyond rounding."""
    return sigma > floor + host.SAME_SIGMA * abs(floor) if math.isfinite(floor) else floor < 0


@dataclass(frozen=True, eq=False)
class PnPEdit(Edit):
    """The injection. features, attentions: where; feature_floor, attention_floor: down to which sigma."""

    features: frozenset[Point] = frozenset()
    attentions: frozenset[Point] = frozenset()
    feature_floor: float = math.inf
    attention_floor: float = math.inf

    def points(self, sigma: float) -> frozenset[Point]:
        chosen = self.features if in_window(sigma, self.feature_floor) else frozenset()
        return chosen | self.attentions if in_window(sigma, self.attention_floor) else chosen

    def attention(self, point: Point, n: Tensor, context: Tensor, value: Tensor, source: SourceRows) -> tuple[Tensor, Tensor, Tensor]:
        return source_self_attention(value, source.get(BRANCH))

    def resblock(self, point: Point, h: Tensor, source: SourceRows) -> Tensor:
        return source_features(h, source.get(BRANCH))


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is a fraction of the run between 0 and 1, but it is {value}.")


def _describe(points: frozenset[Point]) -> str:
    blocks: dict[tuple[str, int], list[int]] = {}
    for point in sorted(points, key=lambda point: point.order):
        blocks.setdefault((point.part, point.number), []).append(point.index)
    return ", ".join(f"{part}{number}" + (f" ({len(indices)} blocks)" if len(indices) > 1 else "") for (part, number), indices in blocks.items()) or "none"


def apply_pnp(
    model,
    trajectory,
    *,
    conditioning: list | None = None,
    feature_layers: str = "preset default",
    attention_layers: str = "preset default",
    tau_f: float = 0.8,
    tau_a: float = 0.5,
    negative_schedule: str = "off",
    negative_alpha: float = 1.0,
    unconditional: list | None = None,
    bank_device: str = "auto",
):
    """A clone of `model` that injects the features of `trajectory`, and a report in words.

    model: ModelPatcher. trajectory: see inversion.trajectory.Trajectory. conditioning: what the source is run with, None
    for the trajectory's own. Layers: notation of blocks.py. tau_f, tau_a: fractions of the run, counted from the
    noisy end. negative_schedule: "off" or one of negative.SCHEDULES, then `unconditional` is needed.
    bank_device: "auto", "gpu", "cpu". Raises ValueError, one sentence, for anything that does not fit together.
    """
    trajectory.check_model(model)
    layers = unet_layers(model)
    features = feature_points(feature_layers, layers)
    attentions = attention_points(attention_layers, layers)
    _check_fraction("tau_f", tau_f)
    _check_fraction("tau_A", tau_a)
    if conditioning is None:
        conditioning = trajectory.conditioning
        if not conditioning:
            raise ValueError("The trajectory holds no conditioning of its own: connect the prompt of the source picture (may be empty) to source.")
    width = host.token_width(model)
    check_conditioning(conditioning, width, "source")
    edit = PnPEdit(
        source=Source(trajectory, ((BRANCH, conditioning),)),
        bank_device=bank_device,
        features=features,
        attentions=attentions,
        feature_floor=window_floor(trajectory.sigmas, tau_f),
        attention_floor=window_floor(trajectory.sigmas, tau_a),
    )
    edits: list[Edit] = [edit]
    steps = len(trajectory.sigmas) - 1
    counts = [step_count(trajectory.sigmas, tau) if points else 0 for tau, points in ((tau_f, features), (tau_a, attentions))]
    report = [
        f"model: {layers.architecture}" + (" (the SDXL layers are experimental: no published choice exists)" if layers.architecture == "SDXL" else ""),
        f"features: {_describe(features)}; first {counts[0]} of {steps} steps",
        f"self-attention: {_describe(attentions)}; first {counts[1]} of {steps} steps",
    ]
    usable = sum("area" not in extra and "mask" not in extra for _, extra in conditioning)
    if len(conditioning) > 1:
        report.append(f"source: one prompt at a time is run, the first of {usable} usable ones that is active at the step (of {len(conditioning)} connected)")
    if not any(counts):
        report.append("no effect: there is no layer with a step at these settings")
        host.log.info("Palimpsest: PnP has no effect, no layer has a step at these settings.")
    if negative_schedule != "off":
        edits.append(_negative_blend(trajectory, negative_schedule, negative_alpha, unconditional, width))
        report.append(f"negative prompt: unconditional share {negative_alpha:g}, {negative_schedule}")
    return add_edits(model, *edits), "\n".join(report)


def _negative_blend(trajectory, schedule: str, alpha: float, unconditional: list | None, width: int | None) -> NegativeBlend:
    if schedule not in SCHEDULES:
        raise ValueError(f'There is no negative schedule "{schedule}": choose one of off, {", ".join(SCHEDULES)}.')
    _check_fraction("negative_alpha", alpha)
    if unconditional is None:
        raise ValueError('Negative blending mixes the negative with an unconditional prediction: connect an empty prompt to unconditional, or set negative_schedule to "off".')
    check_conditioning(unconditional, width, "unconditional")
    return NegativeBlend(unconditional=unconditional, alpha=alpha, schedule=schedule, sigmas=trajectory.sigmas)
