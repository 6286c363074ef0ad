"""The Trajectory: what an inversion found, as a value on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .fingerprint import model_fingerprint, same_model


def prediction_type(model) -> str:
    """What the network of a MODEL predicts: "eps", "v_prediction", "edm", "x0", "img_to_img" or "lcm".

    Read from the model_sampling in force, so ModelSamplingDiscrete and the like are seen. Raises ValueError
    for flow-matching models, whose path from noise to picture is not DDIM's.
    """
    import comfy.model_sampling as sampling

    found = model.get_model_object("model_sampling")
    # most derived first: EDM is a V_PREDICTION, and all of them are EPS
    names = (
        (sampling.IMG_TO_IMG, "img_to_img"),
        (sampling.X0, "x0"),
        (sampling.EDM, "edm"),
        (sampling.V_PREDICTION, "v_prediction"),
    )
    for base, name in names:
        if isinstance(found, base):
            return name
    if any(base.__name__ == "LCM" for base in type(found).__mro__):
        return "lcm"
    if isinstance(found, sampling.EPS):
        return "eps"
    kinds = ", ".join(base.__name__ for base in type(found).__bases__) or type(found).__name__
    raise ValueError(
        f"DDIM inversion needs a model that predicts eps, v or x0, but this model samples with {kinds}: "
        "connect an SD1.x, SD2.x or SDXL model."
    )


def describe_model(model) -> dict[str, str]:
    """The three things that bind a trajectory to a model: architecture, prediction, fingerprint.

    Raises ValueError (one sentence) for a model that is not an SD1.x, SD2.x or SDXL UNet.
    """
    from ..attention_patches.blocks import architecture_name

    architecture = architecture_name(model)
    return {
        "architecture": architecture,
        "prediction": prediction_type(model),
        "fingerprint": model_fingerprint(model),
    }


def _plain(tensor: Tensor) -> Tensor:
    """A float32 CPU copy that is no inference tensor, so that later code may take gradients through it."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The path of a latent from clean to noise, one latent per noise level.

    sigmas: [K] float32, K >= 2, strictly ascending, sigmas[0] the clean end (0 unless a cut schedule was used).
    latents: [K, B, C, H, W] float32 on the CPU in sampler scaling: latents[k] is what the host's sampler holds as
    x at sigmas[k] (y = x_VP sqrt(1 + sigma^2), after the model's latent scale factor).
    conditioning: host CONDITIONING of the run. architecture, prediction, fingerprint: see `describe_model`.
    guidance: cfg of the run. info: figures of the report, JSON-able. noise_mask: the latent's mask, if it had one.

    Compared and hashed by identity. Raises ValueError, one sentence, when the parts do not fit together.
    """

    sigmas: Tensor
    latents: Tensor
    conditioning: list
    architecture: str
    prediction: str
    fingerprint: str
    guidance: float = 1.0
    info: dict = field(default_factory=dict)
    noise_mask: Tensor | None = None

    def __post_init__(self):
        sigmas, latents = self.sigmas, self.latents
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise ValueError(f"A trajectory needs at least two noise levels, but its sigmas have the shape {list(sigmas.shape)}.")
        if latents.ndim != 5 or len(latents) != len(sigmas) or 0 in latents.shape:
            raise ValueError(
                f"A trajectory of {len(sigmas)} noise levels needs latents of shape [{len(sigmas)}, B, C, H, W], but they are {list(latents.shape)}."
            )
        if not bool(torch.isfinite(sigmas).all()) or not bool((sigmas[1:] > sigmas[:-1]).all()) or float(sigmas[0]) < 0:
            raise ValueError("The sigmas of a trajectory must be finite, not negative and ascending, and these are not: invert again.")
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("The trajectory's latents contain NaN or infinite values: invert again.")
        # storing copies keeps the value constant whatever the caller does with its tensors
        object.__setattr__(self, "sigmas", _plain(sigmas))
        object.__setattr__(self, "latents", _plain(latents))
        if self.noise_mask is not None:
            object.__setattr__(self, "noise_mask", _plain(self.noise_mask))

    @classmethod
    def for_model(cls, model, sigmas: Tensor, latents: Tensor, conditioning: list | None = None, **rest) -> "Trajectory":
        """A trajectory bound to `model`; `rest` is guidance, info, noise_mask."""
        return cls(sigmas=sigmas, latents=latents, conditioning=conditioning or [], **describe_model(model), **rest)

    @property
    def steps(self) -> int:
        """Number of steps, one less than of noise levels."""
        return len(self.sigmas) - 1

    def at(self, sigma: float) -> Tensor:
        """The latent [B, C, H, W] (float32, CPU, a fresh tensor) at any noise level.

        Between two stored levels the DDIM path is a straight line in sigma, so this interpolates; beyond the
        ends it follows the last segment. At a stored level the stored latent comes back bit for bit.
        """
        sigma = float(sigma)
        right = int(torch.searchsorted(self.sigmas, torch.tensor(sigma, dtype=torch.float32)))
        index = min(max(right - 1, 0), len(self.sigmas) - 2)
        low, high = float(self.sigmas[index]), float(self.sigmas[index + 1])
        return torch.lerp(self.latents[index], self.latents[index + 1], (sigma - low) / (high - low))

    def check_model(self, model) -> None:
        """Raises ValueError, one sentence, unless `model` is the one the trajectory was made with.

        LoRA and other patches on the same base model are fine; another architecture, prediction type or
        other base weights are not.
        """
        found = describe_model(model)
        if found["architecture"] != self.architecture:
            raise ValueError(
                f"The trajectory was made with an {self.architecture} model, but an {found['architecture']} model is connected: "
                "connect the model that made it, or invert again with this one."
            )
        if found["prediction"] != self.prediction:
            raise ValueError(
                f"The trajectory was made with a model that predicts {self.prediction}, but the connected one predicts "
                f"{found['prediction']}: connect the model that made it, or invert again with this one."
            )
        if not same_model(found["fingerprint"], self.fingerprint):
            raise ValueError(
                f"The trajectory was made with another {self.architecture} model than the connected one (their weights differ): "
                "connect the model that made it, or invert again with this one."
            )


def _latent_format(model):
    return model.get_model_object("latent_format")


def sampler_to_latent(model, y: Tensor) -> Tensor:
    """Sampler scaling -> the scaling of a LATENT wire (divides by the model's latent scale factor), on the CPU.

    Always on the CPU: a GPU rounds this division differently, and "is this latent the trajectory's start?" is
    asked bit for bit.
    """
    return _latent_format(model).process_out(y.to("cpu", torch.float32))


def start_latent(trajectory: Trajectory, model, check: bool = True) -> dict:
    """LATENT holding the noisiest latent: a stock sampler with added noise disabled starts from it.

    Carries the trajectory's noise_mask, if any. check: False where the model has been checked, which reads its
    weights. Raises ValueError if `model` is not the trajectory's.
    """
    if check:
        trajectory.check_model(model)
    latent = {"samples": sampler_to_latent(model, trajectory.latents[-1])}
    if trajectory.noise_mask is not None:
        latent["noise_mask"] = trajectory.noise_mask.clone()
    return latent


def clean_latent(trajectory: Trajectory, model, check: bool = True) -> dict:
    """LATENT holding the clean end of the trajectory: what was inverted. check and errors as in `start_latent`."""
    if check:
        trajectory.check_model(model)
    return {"samples": sampler_to_latent(model, trajectory.latents[0])}
