"""What kind of solver a sampler object of the host is, as far as edits depend on it.

A source that is generated beside the user's run advances by Euler steps. Solvers that add noise would lead the user's run
away from it, solvers that remember earlier steps take another path to a similar end.
"""

from __future__ import annotations

import enum

from . import host


class Solver(enum.Enum):
    """EULER: one call a step, the host's euler and ddim. STAGES: several calls a step. MULTISTEP: remembers earlier steps.
    OTHER_GUIDANCE: steps along another direction than the guided prediction's. STOCHASTIC: adds noise. UNKNOWN: not one of the host's."""

    EULER = "euler"
    STAGES = "several calls per step"
    MULTISTEP = "multistep"
    OTHER_GUIDANCE = "CFG++"
    STOCHASTIC = "stochastic"
    UNKNOWN = "unknown"


# the host offers no such list; the words are parts of its sampler functions' names
NOISY = ("ancestral", "sde", "lcm", "ddpm", "seeds_", "sa_solver")
KINDS = {
    Solver.EULER: ("euler",),
    Solver.STAGES: ("heun", "heunpp2", "dpm_2", "dpm_fast", "dpm_adaptive"),
    Solver.OTHER_GUIDANCE: ("euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp"),
    Solver.MULTISTEP: ("lms", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep", "gradient_estimation", "unipc", "unipc_bh2", "uni_pc", "uni_pc_bh2"),
}


def sampler_name(sampler) -> str:
    """A sampler object's name as the host's lists have it, as far as it can be told; else that of its class."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", None) or type(sampler).__name__
    return name.removeprefix("sample_").removesuffix("_function")


def solver_of(sampler) -> Solver:
    """What kind of solver a sampler object is."""
    name, options = sampler_name(sampler), getattr(sampler, "extra_options", None) or {}
    noise = max(float(options.get(option, 0.0) or 0.0) for option in ("s_churn", "eta"))
    if any(word in name for word in NOISY) or noise > 0.0 and ("s_churn" in options or name == "dpm_adaptive"):
        return Solver.STOCHASTIC
    return next((kind for kind, names in KINDS.items() if name in names), Solver.UNKNOWN)


def check_deterministic(sampler) -> None:
    """For a source that is generated beside the run. Raises ValueError, one sentence, for solvers that add noise; says what others mean for it."""
    kind, name = solver_of(sampler), sampler_name(sampler)
    if kind is Solver.STOCHASTIC:
        raise ValueError(
            f"The sampler {name} adds noise at every step, so the source cannot be generated beside it: "
            "choose euler, ddim or another sampler without noise, or connect a TRAJECTORY from DDIM Invert."
        )
    if kind is Solver.UNKNOWN:
        host.log.warning("Palimpsest: the sampler %s is not known: the source is generated beside it by Euler steps between the noise levels it visits.", name)
    elif kind is not Solver.EULER:
        host.log.info("Palimpsest: under the sampler %s (%s) the source is what euler makes of this noise at the noise levels it visits.", name, kind.value)
