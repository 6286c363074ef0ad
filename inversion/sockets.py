"""The type of a trajectory on the wire, one for all nodes that make or take one."""

from comfy_api.latest import io

TrajectoryType = io.Custom("PALIMPSEST_TRAJECTORY")
