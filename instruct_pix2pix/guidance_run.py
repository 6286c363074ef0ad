"""The image scale during one sampling run: the third prediction, the shift, and which calls get it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Callable

from torch import Tensor

from ..attention_patches import host

KEY = "palimpsest_instruct_pix2pix"  # of our wrappers, and of the run's state in transformer_options
CONCAT = "c_concat"  # the picture's latent in the host's processed conditioning
PAIRS_KEPT = 16
NO_IMAGE = (
    "Neither the positive nor the negative carries a picture, so InstructPix2Pix CFG has nothing to edit: put InstructPix2Pix Conditioning between the prompts "
    "and the sampler."
)


def picture_of(entry: dict):
    """The picture that a processed conditioning entry carries, as the host's object; None where it is missing or zeros."""
    concat = entry["model_conds"].get(CONCAT)
    return concat if concat is not None and bool(concat.cond.any()) else None


def replaced(entry: dict, concat) -> dict:
    """A processed entry with another picture. Everything else stays the same object, the ControlNet above all, so that the host can batch both."""
    return {**entry, "model_conds": {**entry["model_conds"], CONCAT: concat}}


def filled(entries: list[dict], donors: list[dict]) -> list[dict]:
    """Entries with the pictures of `donors`: that of the same area where there is one, else the first."""
    pictures = [(donor.get("area"), picture) for donor in donors if (picture := picture_of(donor)) is not None]

    def fitting(entry):
        return next((picture for area, picture in pictures if area == entry.get("area")), pictures[0][1])

    return [replaced(entry, fitting(entry)) for entry in entries]


def emptied(entries: list[dict]) -> list[dict]:
    """Entries with zeros for a picture, under names of their own."""
    return [{**replaced(entry, type(c)(c.cond.new_zeros(c.cond.shape))), "uuid": uuid.uuid4()} for entry in entries for c in [entry["model_conds"][CONCAT]]]


@dataclass
class Pair:
    """A positive and a negative list of the run, what is evaluated for them, and the last shift.

    given: the lists as they came, kept so that their identities stay theirs. lists: the same with the picture in both. none: the negative without it.
    """

    given: tuple[list, list]
    lists: tuple[list, list]
    none: list
    sigma: float | None = None
    window: tuple | None = None
    shift: Tensor | None = None

    @property
    def names(self) -> set:
        """Uuids of the given entries."""
        return {entry.get("uuid") for entries in self.given for entry in entries}


def prepare(positive: list[dict], negative: list[dict]) -> Pair:
    """The lists of one step. A side without a picture gets the other's. Raises ValueError, one sentence, when neither has one."""
    has = [any(picture_of(entry) is not None for entry in entries) for entries in (positive, negative)]
    if not any(has):
        raise ValueError(NO_IMAGE)
    lists = (positive if has[0] else filled(positive, negative), negative if has[1] else filled(negative, positive))
    if not all(has):
        host.log.info("Palimpsest: the %s carries no picture and gets the %s's.", *(("negative", "positive") if has[0] else ("positive", "negative")))
    return Pair((positive, negative), lists, emptied(lists[1]))


def window_of(model_options: dict) -> tuple | None:
    """Which of the latents this call shows the model, where the host cuts them into windows."""
    window = model_options.get("transformer_options", {}).get("context_window")
    return None if window is None else tuple(window.index_list)


def attention_is_replaced(model_options: dict) -> bool:
    """Whether another node replaces cross-attentions, as those do that tell prompts apart by a 0 or 1 in cond_or_uncond."""
    return bool(model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2"))


class GuidanceRun:
    """What the image scale of one MODEL remembers during one run. guidance: an ImageGuidance. patcher: the ModelPatcher that is sampled."""

    def __init__(self, guidance, patcher):
        self.guidance = guidance
        # here, because a node behind ours may have changed the model's schedule
        self._ceiling, self._floor = host.window(patcher, guidance.start, guidance.end)
        self._pairs: dict[tuple[int, int], Pair] = {}
        self._said: set[str] = set()
        self.acted = False

    def __deepcopy__(self, memo: dict) -> "GuidanceRun":
        return self  # other nodes may deep-copy options in the middle of a run

    def acts_at(self, sigma: float) -> bool:
        """Whether this noise level lies in the window."""
        return self._floor <= sigma <= self._ceiling

    def _warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            host.log.warning("Palimpsest: %s, so the image scale of InstructPix2Pix CFG has no effect.", message)

    def say_if_idle(self, sigmas: Tensor) -> None:
        """Say so when a finished run never had the image scale and nothing has been said about it yet."""
        if not self.acted and not self._said:
            due = any(self.acts_at(float(sigma)) for sigma in sigmas[:-1])
            self._warn("another node evaluates positive and negative apart" if due else "no step of this run lies between its start and its end")

    def evaluate(self, call: Callable[[list], list], conds: list, x: Tensor, sigma: float, model_options: dict) -> list:
        """The host's conditioning batch, shifted by D while the image scale acts.

        call: evaluates lists of processed entries (None for one that is not wanted) at this x [B, C, H, W], one prediction per list. Two lists are
        the positive and the negative. One list that is either of them, at the noise level where both were evaluated last, gets the same D: a
        guidance that compares the step's prediction with one more (PAG, SAG) then finds the same difference as without an image scale. More than
        two, or a list of somebody else, pass through.
        """
        if not self.acts_at(sigma):
            return call(conds)
        wanted = [i for i, entries in enumerate(conds) if entries is not None]
        if len(conds) > 2:
            self._warn(f"the guider evaluates {len(conds)} prompts at once and combines them itself (DualCFGGuider has an image scale of its own)")
        elif len(wanted) == 2:
            return self._both(call, self._pair(*conds), sigma, model_options)
        elif len(wanted) == 1:
            return self._one(call, conds, wanted[0], x, sigma, model_options)
        return call(conds)

    def _pair(self, positive: list, negative: list) -> Pair:
        # the lists stay the same for a whole run unless another node copies them
        key = (id(positive), id(negative))
        if key not in self._pairs:
            if len(self._pairs) >= PAIRS_KEPT:
                self._pairs.pop(next(iter(self._pairs)))
            self._pairs[key] = prepare(positive, negative)
        return self._pairs[key]

    def _both(self, call: Callable[[list], list], pair: Pair, sigma: float, model_options: dict) -> list:
        separate = self.guidance.separate
        if separate == "on" or separate == "auto" and attention_is_replaced(model_options):
            # as the second of two, where other nodes look for a negative; first, because some keep what they saw there last (SAG)
            none = call([None, pair.none])[1]
            full, image, *_ = call([*pair.lists])
        else:
            full, image, none, *_ = call([*pair.lists, pair.none])
        pair.shift = (self.guidance.scale - 1.0) * (image - none)
        pair.sigma, pair.window = sigma, window_of(model_options)
        self.acted = True
        return [full + pair.shift, image + pair.shift]

    def _one(self, call: Callable[[list], list], conds: list, place: int, x: Tensor, sigma: float, model_options: dict) -> list:
        if len(conds) == 2 and conds[1] is None and not self._pairs:
            self._warn("there is no negative")
        pair, lists = self._owner(conds[place], x, sigma, window_of(model_options))
        if pair is None:
            return call(conds)
        out = list(call([lists if i == place else entries for i, entries in enumerate(conds)]))
        out[place] = out[place] + pair.shift
        return out

    def _owner(self, entries: list, x: Tensor, sigma: float, window: tuple | None) -> tuple[Pair | None, list]:
        """The pair evaluated at this noise level that a list belongs to, and the list as it is evaluated there; (None, entries) if it is another's."""
        current = [pair for pair in reversed(self._pairs.values()) if pair.sigma == sigma and pair.window == window and pair.shift.shape == x.shape]
        for pair in current:
            for given, lists in zip(pair.given, pair.lists):
                if entries is given:
                    return pair, lists
        # a copy of a list, as windows make it
        names = {entry.get("uuid") for entry in entries}
        return next((pair for pair in current if names and names <= pair.names), None), entries
