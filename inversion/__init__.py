"""DDIM inversion: the way from a picture back to the noise it could have come from.

`ddim` is pure mathematics on (y, sigma, eps); `trajectory` is the value that travels on the wire;
`storage` keeps it in a file; `run` drives the host's sampling path; `filmstrip` draws.
"""

from .trajectory import Trajectory, start_latent

__all__ = ["Trajectory", "start_latent"]
