"""Save Trajectory and Load Trajectory: schema and wiring."""

from __future__ import annotations

import logging
import os

import folder_paths
from comfy_api.latest import io

from ..common import files
from ..inversion.display import show
from ..inversion.sockets import TrajectoryType
from ..inversion.storage import SUFFIX, load_trajectory, save_trajectory

EXTENSION = ".safetensors"
FOLDER = "trajectories"  # below the output folder: where Save Trajectory writes unless told otherwise
NO_FILES = "none found"


def trajectory_files() -> list[str]:
    """Names for the widget: safetensors files of the input folder, and of the output folder's own place for trajectories, marked [output].

    Names that are not in the list can be given all the same.
    """
    saved = files.listed(os.path.join(folder_paths.get_output_directory(), FOLDER), (SUFFIX,))
    return files.listed(folder_paths.get_input_directory(), (EXTENSION,)) + [f"{FOLDER}/{name} [output]" for name in saved]


def resolve(name: str) -> str:
    """Full path of a widget value. Raises ValueError for a name that leaves the host's folders."""
    return files.resolve(name, "trajectory")


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
                    default=f"{FOLDER}/palimpsest",
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
        folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        name = f"{filename}_{counter:05}_{SUFFIX}"
        path = os.path.join(folder, name)
        skipped = save_trajectory(trajectory, path, files.workflow_of(cls))
        listed = f"{subfolder}/{name} [output]".lstrip("/").replace(os.sep, "/")
        text = f"Saved {listed[: -len(' [output]')]} ({os.path.getsize(path) / 1e6:.1f} MB)"
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
                    options=trajectory_files() or [NO_FILES],
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
        trajectory = load_trajectory(resolve(file))
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
        # taking over this check lets API users name a file that was saved after the list was made
        if file == NO_FILES:
            return "There is no trajectory file yet: save one with Save Trajectory, or copy one into the input folder."
        try:
            path = resolve(file)
        except ValueError as error:
            return str(error)
        if not os.path.isfile(path):
            return f"The trajectory file {file} does not exist: choose another, or save one with Save Trajectory."
        return True

    @classmethod
    def fingerprint_inputs(cls, file):
        try:
            status = os.stat(resolve(file))
        except (OSError, ValueError):
            return file
        return f"{status.st_mtime_ns}:{status.st_size}"


NODES = [SaveTrajectory, LoadTrajectory]
