"""Save Trajectory and Load Trajectory: schema and wiring."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..common.files import workflow_of
from ..common.saved import Kind, saved_line
from ..inversion.display import show
from ..inversion.sockets import TrajectoryType
from ..inversion.storage import SUFFIX, load_trajectory, save_trajectory

FILES = Kind("trajectory", "trajectories", SUFFIX, (".safetensors",), "Save Trajectory")


class SaveTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestSaveTrajectory",
            display_name="Save Trajectory",
            category="Palimpsest/inversion",
            description="Writes a trajectory to the output folder, so that an inversion is paid once and edited later or on another machine.",
            inputs=[
                TrajectoryType.Input("trajectory", tooltip="From DDIM Invert."),
                io.String.Input(
                    "filename_prefix",
                    default=FILES.prefix,
                    tooltip="Folder and beginning of the file name below the output folder; a counter is added. %year%, %month%, %day% and the like are filled in. "
                    "Load Trajectory lists the folder trajectories.",
                ),
            ],
            outputs=[
                io.String.Output("file", display_name="file", tooltip="Name of the file as Load Trajectory lists it."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, trajectory, filename_prefix) -> io.NodeOutput:
        path, listed = FILES.new_file(filename_prefix)
        skipped = save_trajectory(trajectory, path, workflow_of(cls))
        text = saved_line(listed, path)
        if skipped:
            text += f"\nNot saved from the conditioning: {', '.join(skipped)}; connect them again after loading."
            logging.info("Palimpsest: Save Trajectory left out of the conditioning what no file can hold: %s", ", ".join(skipped))
        return io.NodeOutput(listed, ui=show(cls, text))


class LoadTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestLoadTrajectory",
            display_name="Load Trajectory",
            category="Palimpsest/inversion",
            description="Reads a trajectory written by Save Trajectory. The nodes that use it check that it belongs to the connected model.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=FILES.options(),
                    tooltip="A trajectory file of the input folder, or of output/trajectories (marked [output]). Press R to refresh the list.",
                ),
            ],
            outputs=[
                TrajectoryType.Output("trajectory", display_name="trajectory", tooltip="The stored trajectory with its conditioning and mask."),
                io.String.Output("report", display_name="report", tooltip="What the file holds, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        trajectory = load_trajectory(FILES.resolve(file))
        batch, channels, height, width = trajectory.latents.shape[1:]
        report = (
            f"{trajectory.architecture}, predicts {trajectory.prediction}; {trajectory.steps} steps, sigma {float(trajectory.sigmas[0]):.4g} to "
            f"{float(trajectory.sigmas[-1]):.4g}, guidance {trajectory.guidance:g}\n{batch} latent{'s' if batch > 1 else ''} of {width} x {height}, "
            f"{channels} channels{', with a mask' if trajectory.noise_mask is not None else ''}"
        )
        if left_out := trajectory.info.get("left_out"):
            report += f"\nNote: the file does not hold the conditioning's {', '.join(left_out)}."
        return io.NodeOutput(trajectory, report, ui=show(cls, report))

    @classmethod
    def validate_inputs(cls, file):
        return FILES.check(file)

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        return FILES.stamp(file)


NODES = [SaveTrajectory, LoadTrajectory]
