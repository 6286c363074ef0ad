"""The reference pass: the wrappers that attach edits to a MODEL.

One immutable `ReferencePass` per MODEL sits under our key and holds a tuple of edits. During a run a `RunState`, put into
transformer_options, holds everything that changes; it dies with the run. See README.md for the whole picture.
"""

from __future__ import annotations

import weakref

from . import host
from .edit import Edit, RunInfo
from .run_state import RunState
from .source import CoevolvingSource
from .start import check_beginning, prepare_start


class ReferencePass:
    """The wrappers of one MODEL. Immutable: adding an edit makes a new one on a clone."""

    def __init__(self, edits: tuple[Edit, ...]):
        self.edits = edits
        # second net only: the first is the `finally` around the sampler. Holds no run alive.
        self._running: weakref.WeakSet[RunState] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict) -> "ReferencePass":
        return self  # a copy would carry copies of all trajectories

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Check what the edits need before anything is loaded, and start from the trajectory's noise where the user asked for it."""
        shape, guider = tuple(latent_image.shape), executor.class_obj
        for edit in self.edits:
            edit.check(guider, sampler, RunInfo(sigmas, shape))
        edits = [edit for edit in self.edits if edit.takes_part(guider)]
        sources = list({edit.source.key: edit.source for edit in edits if edit.source is not None}.values())
        for source in sources:
            source.check_run(shape, sampler)
        mask = args[0] if args else kwargs.get("denoise_mask")
        stored = [source for source in sources if source.starts]
        if any(isinstance(source, CoevolvingSource) for source in sources):
            check_beginning(guider.model_patcher, noise, sigmas)
        if any(edit.one_picture for edit in edits):
            # edits of one picture in a batch: all latents start from the first one's noise
            noise = noise[:1].expand_as(noise).clone()
        noise, latent_image = prepare_start(executor.class_obj.model_patcher, stored, noise, latent_image, sampler, sigmas, mask)
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
        state = RunState(tuple(edit for edit in self.edits if edit.takes_part(guider)), guider, RunInfo(sigmas, tuple(noise.shape)))
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

    def predict_noise(self, executor, x, timestep, model_options={}, *args, **kwargs):  # noqa: B006 (the host's own default)
        """Hand a step's guided prediction to the run's state."""
        state = model_options.get("transformer_options", {}).get(host.KEY)
        if not isinstance(state, RunState):
            return executor(x, timestep, model_options, *args, **kwargs)
        return state.predict_noise(executor, x, timestep, model_options, *args, **kwargs)

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
    host.set_wrapper(clone, kinds.PREDICT_NOISE, reference.predict_noise)
    host.set_wrapper(clone, kinds.CALC_COND_BATCH, reference.calc_cond_batch)
    host.set_callback(clone, extension.CallbacksMP.ON_CLEANUP, reference.cleanup)
    return clone


def add_edit(model, edit: Edit):
    """A clone of `model` that also carries `edit`."""
    return add_edits(model, edit)
