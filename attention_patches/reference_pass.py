"""The reference pass: edits attached to a MODEL, and what happens during one sampling run.

One immutable `ReferencePass` per MODEL sits under our key and holds a tuple of edits. During a run a `RunState`, put into
transformer_options, holds everything that changes; it dies with the run. See README.md for the whole picture.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Callable, Hashable

from torch import Tensor

from . import host
from .blocks import Point
from .edit import Edit, SourceRows
from .rows import Area, Feature, LayoutMismatch, expand
from .source import check_latent
from .source_run import SourceRun
from .start import prepare_start


@dataclass
class Counters:
    """What a run has cost, for tests and benchmarks."""

    source_calls: int = 0
    source_rows: int = 0
    patch_calls: int = 0


@dataclass(frozen=True)
class Plan:
    """What one call of the host's conditioning batch injects: per point the edits and the features of their source."""

    at: dict[Point, tuple[tuple[Edit, dict[tuple[str, Point], Feature]], ...]]
    conds: list
    roles: tuple[str | None, ...]
    picture: tuple[int, int]  # (H, W) of the latents, of which areas are parts


@dataclass(frozen=True)
class Call:
    """One UNet call: its plan and which part of the picture each chunk shows."""

    plan: Plan
    areas: tuple[Area | None, ...]
    roles: tuple[str | None, ...]
    batch: int
    picture: tuple[int, int]


class RunState:
    """Everything that one sampling run needs to remember. Lives in transformer_options as a plain object."""

    def __init__(self, edits: tuple[Edit, ...], guider):
        self.edits = edits
        self.guider = guider
        self.counters = Counters()
        self._said: set[Hashable] = set()
        self.sources: dict[Hashable, SourceRun] = {}
        for edit in edits:
            if edit.source is not None and edit.source.key not in self.sources:
                banks = {other.bank_device for other in edits if other.source is not None and other.source.key == edit.source.key}
                bank = next(name for name in ("cpu", "auto", "gpu") if name in banks)
                self.sources[edit.source.key] = SourceRun(edit.source, bank, self.counters, self.once)
        self.extras: dict[int, list[dict]] = {}
        # a UNet call is known by its thread: multi-GPU hosts run the chunks of one step in several
        self._calls: dict[int, Call] = {}
        self._hooks: dict[Point, Callable] = {}

    def __deepcopy__(self, memo: dict) -> "RunState":
        return self  # other nodes may deep-copy options in the middle of a run

    def once(self, key: Hashable, message: str, *, warn: bool = False) -> None:
        """Log a line at most once in a run."""
        if key not in self._said:
            self._said.add(key)
            (host.log.warning if warn else host.log.info)("Palimpsest: %s.", message)

    def prepare(self, noise: Tensor, latent_image: Tensor | None, denoise_mask: Tensor | None, seed: int | None) -> None:
        """Process the conditioning that edits bring along. Called when the sampler is about to start."""
        host.tag_roles(self.guider)
        model, device = self.guider.inner_model, noise.device
        for run in self.sources.values():
            run.prepare(model, device, seed)
        for edit in self.edits:
            conditioning = edit.extra_conditioning()
            if conditioning is not None and id(conditioning) not in self.extras:
                self.extras[id(conditioning)] = host.process_alone(conditioning, model, noise, device, latent_image=latent_image, denoise_mask=denoise_mask, seed=seed)

    def warn_if_idle(self, sigmas: Tensor) -> None:
        """Say so when a finished run should have injected something, did not, and nothing has been said about it yet."""
        due = any(edit.points(float(sigma)) for edit in self.edits for sigma in sigmas[:-1])
        if due and not self.counters.patch_calls and not self._said & {"cut", "cut source", "inactive"}:
            self.once("idle", "nothing was injected in this run, although an edit was due: another node replaces the way the host calls the model", warn=True)

    def close(self) -> None:
        """Free features and let go of ControlNets. Safe to call twice."""
        for run in self.sources.values():
            run.close()
        for entries in self.extras.values():
            host.clean_controls(entries)
        self.extras = {}
        self._calls = {}

    def calc_cond_batch(self, executor, model, conds: list, x: Tensor, timestep: Tensor, model_options: dict) -> list[Tensor]:
        """Run the sources if needed, then the user's call with injection, then combine predictions."""
        sigma = float(timestep[0])
        roles = tuple(host.role_of(entries, i, conds, self.guider) for i, entries in enumerate(conds))
        combining = [(i, edit) for i, role in enumerate(roles) if role and conds[i] is not None for edit in self.edits if edit.wants_extra(role, sigma)]
        extras = list({id(edit.extra_conditioning()): None for _, edit in combining})
        all_conds = [*conds, *(self.extras[key] for key in extras)]
        plan = self._plan(executor, model, all_conds, roles + (None,) * len(extras), sigma, x, timestep, model_options)
        options = model_options if plan is None else host.options_with_apply_wrapper(model_options, self._apply_model, **{host.PLAN: plan})
        out = list(executor(model, all_conds, x, timestep, options))
        for i, edit in combining:
            extra = out[len(conds) + extras.index(id(edit.extra_conditioning()))]
            out[i] = edit.combine(roles[i], sigma, out[i], extra)
        return out[: len(conds)]

    def _plan(self, executor, model, conds, roles, sigma, x, timestep, model_options) -> Plan | None:
        active = [(edit, points) for edit in self.edits if (points := edit.points(sigma))]
        wanted: dict[Hashable, frozenset[Point]] = {}
        for edit, points in active:
            if edit.source is not None:
                wanted[edit.source.key] = wanted.get(edit.source.key, frozenset()) | points
        features = {key: self.sources[key].features(executor, model, points, sigma, x, timestep, model_options) for key, points in wanted.items()}
        at: dict[Point, tuple] = {}
        for edit, points in active:
            found, branches = ({}, ()) if edit.source is None else (features[edit.source.key], edit.source.branches)
            for point in points:
                if all((name, point) in found for name, _ in branches):
                    at[point] = (*at.get(point, ()), (edit, found))
        return Plan(at, conds, roles, tuple(x.shape[-2:])) if at else None

    def _apply_model(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs):
        plan = transformer_options.get(host.PLAN)
        order = transformer_options.get("cond_or_uncond")
        if plan is None or not order or x.shape[0] % len(order):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs)
        call = self._describe(plan, x, order, transformer_options)
        if any((x.shape[-2], x.shape[-1]) != ((area.height, area.width) if area else call.picture) for area in call.areas):
            self.once("cut", "another node cuts the picture into tiles whose place is not known: nothing is injected there", warn=True)
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs)
        thread = threading.get_ident()
        self._calls[thread] = call
        options = host.options_with_attention_patch(transformer_options, self._inject_attention)
        hooks = {(point.part, point.number): self._hook(point) for point in plan.at if point.kind == "resblock"}
        try:
            with host.residual_hooks(executor.class_obj, hooks):
                return executor(x, t, c_concat, c_crossattn, control, options, *args, **kwargs)
        finally:
            self._calls.pop(thread, None)

    def _describe(self, plan: Plan, x: Tensor, order: list[int], transformer_options: dict) -> Call:
        uuids = transformer_options.get("uuids") or [None] * len(order)
        picture = plan.picture
        entries = [host.find_entry(plan.conds[i], uuid) for i, uuid in zip(order, uuids)]
        areas = tuple(None if entry is None else host.area_of(entry, picture) for entry in entries)
        return Call(plan, areas, tuple(plan.roles[i] for i in order), x.shape[0] // len(order), picture)

    def _hook(self, point: Point) -> Callable:
        if point not in self._hooks:

            def inject(module, args, output):
                call = self._calls.get(threading.get_ident())
                if call is None:
                    return None
                for edit, features in call.plan.at.get(point, ()):
                    source = self._source_rows(call, point, features, output, tuple(output.shape[-2:]))
                    output = self._guarded(lambda h=output, e=edit, s=source: e.resblock(point, h, s), output)
                return output

            self._hooks[point] = inject
        return self._hooks[point]

    def _inject_attention(self, n, context, value, extra_options, **kwargs):
        call, block = self._calls.get(threading.get_ident()), extra_options.get("block")
        if call is None or block is None:
            return n, context, value
        point = Point("attn1", block[0], block[1], extra_options.get("block_index", 0))
        rewritten = (n, context, value)
        for edit, features in call.plan.at.get(point, ()):
            source = self._source_rows(call, point, features, n, tuple(extra_options["activations_shape"][-2:]))
            rewritten = self._guarded(lambda r=rewritten, e=edit, s=source: e.attention(point, *r, s), rewritten)
        return rewritten

    def _source_rows(self, call: Call, point: Point, features: dict, like: Tensor, size: tuple[int, int]) -> SourceRows:
        def get(branch: str) -> Tensor:
            feature = features[(branch, point)]
            moved = Feature(feature.tensor.to(like), feature.size)
            return expand(moved, call.areas, call.batch, call.picture, size)

        return SourceRows(get, call.roles)

    def _guarded(self, rewrite: Callable, unchanged):
        self.counters.patch_calls += 1
        try:
            return rewrite()
        except LayoutMismatch as mismatch:
            self.once("layout", f"nothing is injected where another node changes the picture or the batch inside the UNet ({mismatch})", warn=True)
            return unchanged


class ReferencePass:
    """The wrappers of one MODEL. Immutable: adding an edit makes a new one on a clone."""

    def __init__(self, edits: tuple[Edit, ...]):
        self.edits = edits
        # second net only: the first is the `finally` around the sampler. Holds no run alive.
        self._running: weakref.WeakSet[RunState] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict) -> "ReferencePass":
        return self  # a copy would carry copies of all trajectories

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Check sizes before anything is loaded, and start from the trajectory's noise where the user asked for it."""
        sources = list({edit.source.key: edit.source for edit in self.edits if edit.source is not None}.values())
        for source in sources:
            check_latent(source, tuple(latent_image.shape))
        mask = args[0] if args else kwargs.get("denoise_mask")
        noise, latent_image = prepare_start(executor.class_obj.model_patcher, sources, noise, latent_image, sampler, sigmas, mask)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """Let the host load and count the models that our conditioning brings (ControlNets), without keeping it in its lists."""
        import comfy.sampler_helpers

        ours = [conditioning for edit in self.edits if edit.source is not None for _, conditioning in edit.source.branches]
        ours += [conditioning for edit in self.edits if (conditioning := edit.extra_conditioning()) is not None]
        added = {f"{host.KEY}_{i}": comfy.sampler_helpers.convert_cond(conditioning) for i, conditioning in enumerate(ours)}
        real_model, _, models = executor(model, noise_shape, {**conds, **added}, *args, **kwargs)
        return real_model, conds, models

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *args, **kwargs):
        """Give the run its state, and take it away however the run ends."""
        state = RunState(self.edits, guider)
        self._running.add(state)
        collectors = list({id(edit.collector): edit.collector for edit in self.edits if edit.collector is not None}.values())
        completed = False
        try:
            for collector in collectors:
                collector.start()
            state.prepare(noise, latent_image, denoise_mask, extra_args.get("seed"))
            extra_args["model_options"].setdefault("transformer_options", {})[host.KEY] = state
            samples = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)
            completed = True
            state.warn_if_idle(sigmas)
            return samples
        finally:
            state.close()
            self._running.discard(state)
            for collector in collectors:
                collector.finish(completed)

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options, *args, **kwargs):
        """Hand the call to the run's state; a call outside a sampler passes through."""
        state = model_options.get("transformer_options", {}).get(host.KEY)
        if not isinstance(state, RunState):
            return executor(model, conds, x_in, timestep, model_options, *args, **kwargs)
        return state.calc_cond_batch(executor, model, conds, x_in, timestep, model_options)

    def cleanup(self, patcher) -> None:
        """ON_CLEANUP: runs after every sampling of the host, cancelled or not."""
        for state in list(self._running):
            if state.guider.model_patcher is patcher:
                state.close()


def edits_of(model) -> tuple[Edit, ...]:
    """The edits that a MODEL carries, in the order they were added."""
    import comfy.patcher_extension as extension

    wrappers = model.get_wrappers(extension.WrappersMP.CALC_COND_BATCH, host.KEY)
    return wrappers[0].__self__.edits if wrappers else ()


def add_edits(model, *edits: Edit):
    """A clone of `model` (a ModelPatcher) that also carries `edits`. The given MODEL is not changed."""
    import comfy.patcher_extension as extension

    clone = model.clone()
    reference = ReferencePass(edits_of(model) + edits)
    kinds = extension.WrappersMP
    host.set_wrapper(clone, kinds.OUTER_SAMPLE, reference.outer_sample)
    host.set_wrapper(clone, kinds.PREPARE_SAMPLING, reference.prepare_sampling)
    host.set_wrapper(clone, kinds.SAMPLER_SAMPLE, reference.sampler_sample)
    host.set_wrapper(clone, kinds.CALC_COND_BATCH, reference.calc_cond_batch)
    host.set_callback(clone, extension.CallbacksMP.ON_CLEANUP, reference.cleanup)
    return clone


def add_edit(model, edit: Edit):
    """A clone of `model` that also carries `edit`."""
    return add_edits(model, edit)
