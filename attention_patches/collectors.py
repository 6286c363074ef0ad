"""Collectors: how something seen during sampling reaches a node after the sampler.

A collector is made by the node that patches the MODEL and travels on a wire of its own. A viewing node takes the
collector *and* the sampler's LATENT, so the host runs it after the sampler. The collector belongs to one execution of
its node; the host's cache may reuse it, then it holds what the last run left in it.
"""

from __future__ import annotations

from typing import Any

NEVER_RUN = "the patched MODEL has not been sampled since its node ran (the sampler may use another MODEL, or the host reused a cached LATENT)"
CANCELLED = "the last run was cancelled or failed before it ended"
NOTHING_SEEN = "the run visited no step and no layer that was asked for"


class Collector:
    """Holds values found during one run, by key. The one mutable thing an edit may point to."""

    def __init__(self, what: str, nothing: str | None = None):
        """what: the contents in words, for messages ("attention maps"). nothing: where it is known that no run will fill it, why and what to do."""
        self.what = what
        self.nothing = nothing
        self._items: dict[Any, Any] = {}
        self._reason = NEVER_RUN

    def start(self) -> None:
        """A run begins: forget the previous one."""
        self._items = {}
        self._reason = CANCELLED

    def finish(self, completed: bool) -> None:
        """The run has ended; what an unfinished run left is dropped."""
        if completed:
            self._reason = NOTHING_SEEN
        else:
            self._items = {}

    def add(self, key: Any, value: Any) -> None:
        """Keep a value; called by an edit during the run. A later value of the same key wins."""
        self._items[key] = value

    def get(self, key: Any, default: Any = None) -> Any:
        """The value kept so far under `key`, for edits that add up."""
        return self._items.get(key, default)

    def read(self) -> dict[Any, Any]:
        """Everything of the last run. Raises ValueError, one sentence with the reason, when there is nothing."""
        if not self._items and self.nothing is not None:
            raise ValueError(f"There are no {self.what} to show because {self.nothing}.")
        if not self._items:
            raise ValueError(
                f"There are no {self.what} to show because {self._reason}: connect this node to the LATENT of the sampler "
                "that uses the patched MODEL, and queue again."
            )
        return dict(self._items)
