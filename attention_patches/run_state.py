"""What one sampling run remembers, and what happens in each of its calls. See README.md for the whole picture."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Callable, Hashable

from torch import Tensor

from . import host
from .blocks import Point
from .coevolving import CoevolvingRun
from .concept_run import ConceptRun, ConceptSource
from .edit import Chunk, Edit, RunInfo, SourceRows
from .rows import Area, Feature, LayoutMismatch, expand
from .source import CoevolvingSource
from .source_run import CONTEXT, SourceRun


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
    sigma: float


@dataclass(frozen=True)
class Call:
    """One UNet call: its plan, what its chunks are and which part of the picture each shows."""

    plan: Plan
    chunks: tuple[Chunk, ...]
    areas: tuple[Area | None, ...]
    batch: int


class BlockAttention:
    """The attention of one transformer block in one call, for `Edit.attend`."""

    def __init__(self, module, below: Callable, extra_options: dict):
        self._below, self._options = below, extra_options
        self.alone = below is host.attention
        self.heads = extra_options["n_heads"]
        self.to_q, self.to_k, self.to_v = module.to_q, module.to_k, module.to_v

    def below(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._below(q, k, v, self._options)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return host.attention(q, k, v, self._options)


class RunState:
    """Everything that one sampling run needs to remember. Lives in transformer_options as a plain object."""

    def __init__(self, edits: tuple[Edit, ...], guider, info: RunInfo):
        self.info = info
        self.edits = tuple(edit.for_run(info) for edit in edits)
        self.guider = guider
        self.counters = Counters()
        self._said: set[Hashable] = set()
        self.sources: dict[Hashable, SourceRun] = {}
        for edit in self.edits:
            if edit.source is not None and edit.source.key not in self.sources:
                banks = {other.bank_device for other in self.edits if other.source is not None and other.source.key == edit.source.key}
                bank = next(name for name in ("cpu", "auto", "gpu") if name in banks)
                self.sources[edit.source.key] = self._start(edit.source, bank)
        self._last_needed = {key: self._last(key) for key in self.sources}
        self.extras: dict[int, list[dict]] = {}
        # a UNet call is known by its thread: multi-GPU hosts run the chunks of one step in several
        self._calls: dict[int, Call] = {}
        self._hooks: dict[Point, Callable] = {}

    def __deepcopy__(self, memo: dict) -> "RunState":
        return self  # other nodes may deep-copy options in the middle of a run

    def _start(self, source, bank: str) -> SourceRun:
        if isinstance(source, CoevolvingSource):
            return CoevolvingRun(source, bank, self.counters, self.once, self.guider, self.info.sigmas)
        if isinstance(source, ConceptSource):
            return ConceptRun(source, bank, self.counters, self.once, self.guider)
        return SourceRun(source, bank, self.counters, self.once)

    def _last(self, key: Hashable) -> float:
        """Lowest noise level of the run's schedule at which an edit asks for a source; inf when none does."""
        own = [edit for edit in self.edits if edit.source is not None and edit.source.key == key]
        return min((float(s) for s in self.info.sigmas[:-1] if any(edit.points(float(s)) or edit.wants_prediction(float(s)) for edit in own)), default=float("inf"))

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
            run.prepare(model, noise, seed, latent_image, denoise_mask)
        for edit in self.edits:
            conditioning = edit.extra_conditioning()
            if conditioning is not None and id(conditioning) not in self.extras:
                self.extras[id(conditioning)] = host.process_alone(conditioning, model, noise, device, latent_image=latent_image, denoise_mask=denoise_mask, seed=seed)

    def warn_if_idle(self, sigmas: Tensor) -> None:
        """Say so when a finished run should have injected something, did not, and nothing has been said about it yet."""
        due = any(edit.points(float(sigma)) for edit in self.edits for sigma in sigmas[:-1])
        if due and not self.counters.patch_calls and not self._said & {"cut", "cut source", "inactive", "window"}:
            self.once("idle", "nothing was injected in this run, although an edit was due: another node replaces the way the host calls the model", warn=True)

    def close(self) -> None:
        """Free features and let go of ControlNets. Safe to call twice."""
        for run in self.sources.values():
            run.close()
        for entries in self.extras.values():
            host.clean_controls(entries)
        self.extras = {}
        self._calls = {}

    def predict_noise(self, executor, x: Tensor, timestep: Tensor, *args, **kwargs) -> Tensor:
        """Let edits change the guided prediction of a step."""
        denoised = executor(x, timestep, *args, **kwargs)
        sigma = float(timestep.flatten()[0])
        for edit in self.edits:
            if edit.wants_prediction(sigma):
                denoised = edit.predicted(sigma, x, denoised, None if edit.source is None else self.sources[edit.source.key])
        return denoised

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
        for key, run in self.sources.items():
            # a generated source has to be taken along to where it is needed next
            if not run.stops and sigma >= self._last_needed[key] * (1 - host.SAME_SIGMA):
                wanted.setdefault(key, frozenset())
        present = frozenset(role for role, entries in zip(roles, conds) if entries is not None)
        for key in wanted:
            self.sources[key].roles = present
        features = {key: self.sources[key].features(executor, model, points, sigma, x, timestep, model_options) for key, points in wanted.items()}
        at: dict[Point, tuple] = {}
        for edit, points in active:
            found, branches = ({}, ()) if edit.source is None else (features[edit.source.key], edit.source.branches)
            enough = all if edit.source is None or edit.source.together else any
            for point in points:
                if enough((name, point) in found for name, _ in branches):
                    at[point] = (*at.get(point, ()), (edit, found))
        return Plan(at, conds, roles, tuple(x.shape[-2:]), sigma) if at else None

    def _apply_model(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs):
        plan = transformer_options.get(host.PLAN)
        order = transformer_options.get("cond_or_uncond")
        if plan is None or not order or x.shape[0] % len(order):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs)
        call = self._describe(plan, x, order, transformer_options)
        if any((x.shape[-2], x.shape[-1]) != ((area.height, area.width) if area else plan.picture) for area in call.areas):
            self.once("cut", "another node cuts the picture into tiles whose place is not known: nothing is injected there", warn=True)
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs)
        thread = threading.get_ident()
        self._calls[thread] = call
        options = host.options_with_attention_patch(transformer_options, self._inject_attention, {point.kind for point in plan.at})
        replaced = [point for point, edits in plan.at.items() if any(edit.replaces(point, plan.sigma) for edit, _ in edits)]
        if replaced:
            options = host.options_with_replacers(options, {tuple(point): self._replacer(point, executor.class_obj) for point in replaced})
        hooks = {(point.part, point.number): self._hook(point) for point in plan.at if point.kind == "resblock"}
        try:
            with host.residual_hooks(executor.class_obj, hooks):
                return executor(x, t, c_concat, c_crossattn, control, options, *args, **kwargs)
        finally:
            self._calls.pop(thread, None)

    def _describe(self, plan: Plan, x: Tensor, order: list[int], transformer_options: dict) -> Call:
        uuids = transformer_options.get("uuids") or [None] * len(order)
        entries = [host.find_entry(plan.conds[i], uuid) or {} for i, uuid in zip(order, uuids)]
        areas = tuple(host.area_of(entry, plan.picture) for entry in entries)
        chunks = tuple(Chunk(plan.roles[i], entry.get(host.MARK), area is None) for i, entry, area in zip(order, entries, areas))
        return Call(plan, chunks, areas, x.shape[0] // len(order))

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

    def _inject_attention(self, kind: str, n, context, value, extra_options):
        call, block = self._calls.get(threading.get_ident()), extra_options.get("block")
        if call is None or block is None:
            return n, context, value
        point = Point(kind, block[0], block[1], extra_options.get("block_index", 0))
        rewritten = (n, context, value)
        for edit, features in call.plan.at.get(point, ()):
            source = self._source_rows(call, point, features, n, tuple(extra_options["activations_shape"][-2:]))
            rewritten = self._guarded(lambda r=rewritten, e=edit, s=source: e.attention(point, *r, s), rewritten)
        return rewritten

    def _replacer(self, point: Point, base_model) -> Callable:
        module = host.attention_module(base_model, *point)

        def replace(there, q, k, v, extra_options):
            call = self._calls.get(threading.get_ident())
            size = tuple(extra_options["activations_shape"][-2:])
            below = there
            for edit, features in () if call is None else call.plan.at.get(point, ()):
                if edit.replaces(point, call.plan.sigma):
                    below = self._over(below, edit, point, call, features, size, module)
            return below(q, k, v, extra_options)

        return replace

    def _over(self, below: Callable, edit: Edit, point: Point, call: Call, features: dict, size: tuple[int, int], module) -> Callable:
        def attend(q, k, v, extra_options):
            source = self._source_rows(call, point, features, q, size)
            attention = BlockAttention(module, below, extra_options)
            out = self._guarded(lambda: edit.attend(point, q, k, v, source, attention), None)
            return below(q, k, v, extra_options) if out is None else out

        return attend

    def _source_rows(self, call: Call, point: Point, features: dict, like: Tensor, size: tuple[int, int]) -> SourceRows:
        def rows(branch: str, areas: tuple[Area | None, ...]) -> Tensor:
            feature = features[(branch, point)]
            moved = Feature(feature.tensor.to(like), feature.size)
            return expand(moved, areas, call.batch, call.plan.picture, size)

        def context(branch: str) -> Tensor:
            feature = features[(branch, CONTEXT)]
            return expand(Feature(feature.tensor.to(like), feature.size), (None,), call.batch, call.plan.picture, feature.size)

        return SourceRows(
            get=lambda branch: rows(branch, call.areas),
            of=lambda branch, i: rows(branch, call.areas[i : i + 1]),
            stored=lambda branch: features[(branch, point)],
            context=context,
            chunks=call.chunks,
            batch=call.batch,
            sigma=call.plan.sigma,
            size=size,
        )

    def _guarded(self, rewrite: Callable, unchanged):
        self.counters.patch_calls += 1
        try:
            return rewrite()
        except LayoutMismatch as mismatch:
            self.once("layout", f"nothing is injected where another node changes the picture or the batch inside the UNet ({mismatch})", warn=True)
            return unchanged
