"""The reference pass of one source during one run: runs the source, captures features, hands them out."""

from __future__ import annotations

from typing import Callable, Hashable

import torch
from torch import Tensor

from . import host
from .blocks import Point
from .rows import Feature
from .source import Source
from .store import FeatureStore, feature_bytes

AUTO_SHARE = 0.25  # "auto" keeps features on the GPU while they take less than this share of its free memory
CONTEXT = Point("context", "input", 0)  # under which the text tokens of a branch are stored, beside its features


class StopForward(Exception):
    """Raised inside the UNet after the last feature is captured; what follows would be thrown away."""


def first_usable(entries: list[dict], sigma: float) -> dict | None:
    """The first processed entry that is active at a noise level and covers the whole picture."""
    return next((entry for entry in entries if "area" not in entry and "mask" not in entry and host.is_active(entry, sigma)), None)


class SourceRun:
    """Features of one source, computed once per noise level, by calls of their own ("separate" form).

    The other form that gives the same numbers, source rows that ride in the user's own call ("joined"), would replace
    `features` by a late APPLY_MODEL wrapper that appends and strips rows; see README.md, "Two forms".
    """

    stops = True  # the source's own output is not wanted
    windowed = True  # context windows of the host cut the source as they cut the run
    inactive = "the source's conditioning is switched off at some steps (start and end percent): nothing is injected there"

    def __init__(self, source: Source, bank_device: str, counters, once: Callable[..., None]):
        self.source = source
        self.bank_device = bank_device
        self.counters = counters
        self.once = once
        self.store = FeatureStore()
        self.branches: dict[str, list[dict]] = {}
        self.roles: frozenset[str | None] = frozenset()  # whose conditioning the user's current call holds
        self._wanted: tuple[Point, ...] = ()
        self._shape: tuple[int, ...] = ()
        self._entry = None
        self._rows = slice(None)
        self._taken: dict[Point, Feature] = {}
        self._hooks: dict[Point, Callable] = {}

    def prepare(self, model, noise: Tensor, seed: int | None, latent_image: Tensor | None = None, denoise_mask: Tensor | None = None) -> None:
        """Process the source's conditioning, alone, once per run. noise, latent_image [B, C, H, W], denoise_mask: of the user's run."""
        clean = self.source.trajectory.latents[0].to(noise.device)
        for name, conditioning in self.source.branches:
            # inpainting and instruction models find their extra channels in latent_image: the source's own picture
            self.branches[name] = host.process_alone(conditioning, model, torch.zeros_like(clean), noise.device, latent_image=clean, seed=seed)

    def features(self, executor, model, points: frozenset[Point], sigma: float, x: Tensor, timestep: Tensor, model_options: dict) -> dict[tuple[str, Point], Feature]:
        """Features of `points` for every branch at this noise level; run the source if they are not there yet.

        The features of the first call at a noise level serve all later calls at it. A point is missing where the
        source's conditioning is switched off or another node cuts the picture in a way we cannot follow.
        """
        window = model_options.get("transformer_options", {}).get("context_window") if self.windowed else None
        cut = self.cut(sigma, window)
        stored = self.store.get(sigma, cut)
        if stored is None:
            self._wanted = tuple(sorted(points, key=lambda point: point.order))
            stored = self._run_pass(executor, model, sigma, x, timestep, model_options, window)
            self.store.put(sigma, stored, cut)
            if stored and self.store.device is None:
                self._choose_bank(feature_bytes(stored), x.device, len(points))
        return stored

    def cut(self, sigma: float, window) -> Hashable:
        """What beside the noise level tells passes apart: the context window."""
        return None if window is None else (getattr(window, "dim", 0), tuple(getattr(window, "index_list", ())))

    def due(self, sigma: float) -> list[tuple[str, list[dict]]]:
        """The branches to run in a pass, with their processed conditioning."""
        return list(self.branches.items())

    def visit(self, sigma: float, following: float) -> tuple[Tensor, Tensor]:
        """(x, denoised) [B, C, H, W] of the source at `sigma`, such that one Euler step to `following` stays on its path.

        With r = following / sigma: denoised = (y_following - r y) / (1 - r), the source put back on its stored path ("direct
        inversion", Ju et al., ICLR 2024), in sigma space.
        """
        trajectory = self.source.trajectory
        ratio = following / sigma
        here = trajectory.at(sigma)
        return here, (trajectory.at(following) - ratio * here) / (1.0 - ratio)

    def close(self) -> None:
        """Free everything the run holds."""
        self.store.clear()
        self._taken = {}
        for entries in self.branches.values():
            host.clean_controls(entries)
        self.branches = {}

    def usable_entry(self, entries: list[dict], sigma: float) -> dict | None:
        """The entry of a branch that features are read from: the first that is active and covers the whole picture."""
        entry = first_usable(entries, sigma)
        if entry is None:
            self.once("inactive", self.inactive)
        return entry

    def latents_of(self, branch: str, sigma: float) -> Tensor:
        """What a branch is run with at a noise level, [B, C, H, W] in sampler scaling."""
        return self.source.trajectory.at(sigma)

    def _run_pass(self, executor, model, sigma, x, timestep, model_options, window) -> dict[tuple[str, Point], Feature]:
        features: dict[tuple[str, Point], Feature] = {}
        for name, entries in self.due(sigma):
            entry = self.usable_entry(entries, sigma)
            if entry is None:
                continue
            latents = self.latents_of(name, sigma).to(x)
            if window is not None:
                latents = window.get_tensor(latents)

            def run(options, entry=entry, latents=latents):
                # index 0 of a list of one: other packs record maps for any call that contains index 1
                executor(model, [[entry]], latents, timestep[:1].repeat(latents.shape[0]), options)

            taken = self.capture(entry, latents, model_options, run)
            features.update({(name, point): feature for point, feature in taken.items()})
        return features

    def capture(self, entry: dict | None, latents: Tensor, model_options: dict, run: Callable[[dict], object]) -> dict[Point, Feature]:
        """What `run(options)` computes for one entry's rows at the wanted points. latents: [B, C, H, W] that it runs with."""
        self._entry, self._shape, self._taken = None if entry is None else entry.get("uuid"), tuple(latents.shape), {}
        options = host.options_with_apply_wrapper(model_options, self._apply_model)
        self.counters.source_calls += 1
        try:
            run(options)
        except StopForward:
            pass
        taken, self._taken = self._taken, {}
        return taken

    def _apply_model(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs):
        self.counters.source_rows += x.shape[0]
        entries = transformer_options.get("uuids") or [self._entry]
        batch = x.shape[0] // len(entries)
        if self._entry not in entries or not self._wanted:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs)
        if (batch, *x.shape[1:]) != self._shape:
            # features of a tile would pass for those of the picture
            self.once("cut source", "another node cuts the source's picture into tiles: nothing is injected there", warn=True)
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs)
        place = entries.index(self._entry)
        self._rows = slice(place * batch, (place + 1) * batch)
        if c_crossattn is not None and CONTEXT not in self._taken:
            self._taken[CONTEXT] = Feature(c_crossattn[self._rows].detach().clone(), (c_crossattn.shape[1], 1))
        options = host.options_with_attention_patch(transformer_options, self._capture_attention, {point.kind for point in self._wanted})
        hooks = {(point.part, point.number): self._hook(point) for point in self._wanted if point.kind == "resblock"}
        with host.residual_hooks(executor.class_obj, hooks):
            return executor(x, t, c_concat, c_crossattn, control, options, *args, **kwargs)

    def _hook(self, point: Point) -> Callable:
        if point not in self._hooks:

            def capture(module, args, output):
                self._take(point, output, (output.shape[-2], output.shape[-1]))

            self._hooks[point] = capture
        return self._hooks[point]

    def _capture_attention(self, kind: str, n, context, value, extra_options):
        block = extra_options.get("block")
        if block is not None:
            point = Point(kind, block[0], block[1], extra_options.get("block_index", 0))
            if point in self._wanted:
                self._take(point, n, tuple(extra_options["activations_shape"][-2:]))
        return n, context, value

    def _take(self, point: Point, tensor: Tensor, size: tuple[int, int]) -> None:
        if point in self._taken:
            # a later call of the same pass is another node's (PAG, SAG), and disturbed
            return
        # a copy: later patches and the host itself write into block outputs in place
        self._taken[point] = Feature(tensor[self._rows].detach().clone(), (int(size[0]), int(size[1])))
        if self.stops and point == self._wanted[-1]:
            raise StopForward

    def _choose_bank(self, size: int, device: torch.device, layers: int) -> None:
        import comfy.model_management

        choice = self.bank_device
        if choice == "auto":
            free = comfy.model_management.get_free_memory(device)
            choice = "gpu" if device.type == "cpu" or size < AUTO_SHARE * free else "cpu"
        bank = torch.device("cpu") if choice == "cpu" else device
        self.store.move(bank)
        self.once("bank", f"reference features: {layers} layers, {size / 2**20:.1f} MB per step, kept on {bank}")
