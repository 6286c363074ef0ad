"""Runs of the host's stock samplers, as the nodes KSampler, KSamplerAdvanced and SamplerCustomAdvanced make them.

Under inference_mode, as the host's executor runs its nodes.
"""

from __future__ import annotations

import torch


def latent_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Unit noise on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def schedule(model, steps: int, scheduler: str = "normal") -> torch.Tensor:
    """Descending sigmas [steps + 1] of the host's scheduler."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).cpu()


@torch.inference_mode()
def ksampler(model, latent, positive, negative, *, steps=4, cfg=4.0, sampler="euler", scheduler="normal", denoise=1.0, seed=1, **advanced):
    """KSampler's result (samples [B, C, H, W]); `advanced`: disable_noise, start_step, last_step, force_full_denoise."""
    import nodes

    latent = latent if isinstance(latent, dict) else {"samples": latent}
    (out,) = nodes.common_ksampler(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise, **advanced)
    return out["samples"]


@torch.inference_mode()
def custom_advanced(model, latent, positive, negative, sigmas, *, cfg=4.0, sampler="euler", seed=1, noise=None):
    """SamplerCustomAdvanced with CFGGuider and DisableNoise (or the given noise)."""
    import comfy.samplers

    latent = latent if isinstance(latent, dict) else {"samples": latent}
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    samples = latent["samples"]
    noise = torch.zeros_like(samples) if noise is None else noise
    chosen = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return guider.sample(noise, samples, chosen, sigmas, denoise_mask=latent.get("noise_mask"), disable_pbar=True, seed=seed)


def no_free_memory(monkeypatch) -> None:
    """Make the host believe that memory is short, so that it runs every piece of conditioning in a call of its own."""

    def free(dev=None, torch_free_too=False):
        return (1, 1) if torch_free_too else 1

    monkeypatch.setattr("comfy.model_management.get_free_memory", free)


class Watch:
    """Adds a wrapper inside ours and notes every conditioning call and the run's state.

    states: RunState objects seen. calls: (number of latents, number of lists) per inner call.
    """

    def __init__(self):
        self.states: list = []
        self.calls: list[tuple[int, int]] = []
        self.sigmas: list[float] = []

    def on(self, model):
        """A clone of `model` that is watched."""
        import comfy.patcher_extension

        clone = model.clone()
        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "watch", self._wrapper)
        return clone

    def _wrapper(self, executor, model, conds, x, timestep, model_options, *args, **kwargs):
        state = model_options["transformer_options"].get("palimpsest")
        if state is not None and state not in self.states:
            self.states.append(state)
        self.calls.append((x.shape[0], len(conds)))
        self.sigmas.append(float(timestep[0]))
        return executor(model, conds, x, timestep, model_options, *args, **kwargs)

    @property
    def counters(self):
        """Counters of the last run."""
        return self.states[-1].counters


class OneByOne:
    """A context handler that shows the model one latent of the batch at a time, as the host's windows do."""

    def should_use_context(self, *args):
        return True

    def execute(self, calc, model, conds, x, timestep, model_options):
        from comfy.context_windows import IndexListContextWindow

        out = [torch.zeros_like(x) for _ in conds]
        for row in range(x.shape[0]):
            window = IndexListContextWindow([row], dim=0)
            model_options["transformer_options"]["context_window"] = window
            for whole, part in zip(out, calc(model, [entries and list(entries) for entries in conds], x[row : row + 1], timestep[row : row + 1], model_options)):
                whole[row] = part[0]
        return out
