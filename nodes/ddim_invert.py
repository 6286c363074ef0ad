"""DDIM Invert and Reconstruct Check: schema and wiring."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy_api.latest import io

from ..inversion import filmstrip
from ..inversion.ddim import CONVENTIONS
from ..inversion.display import show
from ..inversion.pictures import decode_frames, to_pictures
from ..inversion.report import decibel, describe, psnr
from ..inversion.run import input_scale, run_inversion, run_reconstruction
from ..inversion.sockets import TrajectoryType
from ..inversion.trajectory import clean_latent, start_latent

DIFFERENCE_GAIN = 4.0


class DDIMInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestDDIMInvert",
            display_name="DDIM Invert",
            category="Palimpsest/inversion",
            description=(
                "Finds the noise from which the model would sample your picture again, and keeps every latent on the way "
                "as a trajectory for the editing nodes. Sample back with euler or ddim, the same steps and scheduler, cfg 1, "
                "the same prompt and no added noise, and the picture returns."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The SD1.x, SD2.x or SDXL model that will also sample afterwards. Others are refused by name."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The picture to invert, from VAE Encode; any batch size. A noise mask is carried along in the trajectory; "
                    "the inversion itself covers the whole latent.",
                ),
                io.Conditioning.Input("positive", tooltip="A prompt that describes the picture. An empty prompt works too and inverts a little less exactly."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    step=1,
                    tooltip="Number of steps, the same as in the sampler afterwards. 20 to 50 is usual; more is more exact and takes longer.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="ddim_uniform",
                    tooltip="Noise schedule, the same as in the sampler afterwards. ddim_uniform is the published setting; "
                    "it keeps the step count exactly when it divides 1000.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="cfg during the inversion, no unit. 1 (recommended) follows the model itself; "
                    "above 1 the path back differs more and more, and a negative conditioning is needed.",
                ),
                io.Int.Input(
                    "iterations",
                    default=2,
                    min=0,
                    max=5,
                    step=1,
                    tooltip="Fixed-point repeats per step, 0 to 5: each costs one more model call per step and makes the way back more exact. "
                    "0 is plain DDIM. Stops by itself where it would get worse.",
                ),
                io.Combo.Input(
                    "convention",
                    options=list(CONVENTIONS),
                    default="destination",
                    tooltip="Noise level at which the model is asked. destination: the level a step goes to (null-text inversion, diffusers). "
                    "source: the level it comes from (flipped sigmas, the original Plug-and-Play).",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed only when guidance is not 1."),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Your own noise schedule, in the order a sampler takes it; replaces steps and scheduler. It must fall strictly.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the film strip's pictures. Without it they are the host's quick latent previews."),
            ],
            outputs=[
                io.Latent.Output("noise", display_name="noise", tooltip="The noisiest latent, ready for a sampler with added noise switched off."),
                TrajectoryType.Output(
                    "trajectory",
                    display_name="trajectory",
                    tooltip="All latents of the path with their noise levels, for PnP Injector, Reconstruct Check and Save Trajectory.",
                ),
                io.String.Output("report", display_name="report", tooltip="Steps, exactness, what the refinement gained, and time, as text."),
                io.Image.Output(
                    "film_strip",
                    display_name="film_strip",
                    tooltip="What the model takes the clean picture to be (top) and the latent itself (bottom) along the path; one strip per picture.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, latent_image, positive, steps, scheduler, guidance, iterations, convention, negative=None, sigmas=None, vae=None
    ) -> io.NodeOutput:
        inversion = run_inversion(
            model,
            latent_image,
            positive,
            negative,
            steps=steps,
            scheduler=scheduler,
            sigmas=sigmas,
            guidance=guidance,
            iterations=iterations,
            convention=convention,
        )
        trajectory = inversion.trajectory
        report = describe(trajectory)
        film_strip = cls.draw(model, inversion, vae)
        noise = {**latent_image, **start_latent(trajectory, model, check=False)}
        # outside a mask the host keeps the sampler's latent, and here that is noise; see run.MASK_NOTE
        noise.pop("noise_mask", None)
        return io.NodeOutput(noise, trajectory, report, film_strip, ui=show(cls, report, film_strip))

    @staticmethod
    def draw(model, inversion, vae) -> torch.Tensor:
        """The film strips [B, H, W, 3]."""
        frames = inversion.frames
        batch = len(frames[0][1])
        predicted = decode_frames(model, [latents for _, latents in frames], vae)
        # noisy latents as the network sees them
        scale = input_scale(model.get_model_object("model_sampling"))
        noisy = torch.cat([inversion.trajectory.at(sigma) * scale(sigma) for sigma, _ in frames])
        noisy = filmstrip.latent_to_rgb(model.get_model_object("latent_format"), noisy)
        strips = []
        for row in range(batch):
            captions = [f"sigma {sigma:.3g}" if index else "input" for index, (sigma, _) in enumerate(frames)]
            strips.append(
                filmstrip.strip(
                    [
                        [(predicted[index * batch + row], caption) for index, caption in enumerate(captions)],
                        [(noisy[index * batch + row], "latent") for index in range(len(captions))],
                    ]
                )
            )
        return torch.cat(strips)


class ReconstructCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestReconstructCheck",
            display_name="Reconstruct Check",
            category="Palimpsest/inversion",
            description=(
                "Samples a trajectory back to its clean end with the host's euler sampler and says how close the picture comes "
                "to the one that was inverted. Above about 30 dB the difference is hard to see."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that made the trajectory. LoRA and other patches are allowed, and their effect shows in the result."),
                TrajectoryType.Input("trajectory", tooltip="From DDIM Invert or Load Trajectory."),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Replaces the prompt stored in the trajectory. Another prompt than the inversion's reconstructs less exactly.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed only when the trajectory was made with guidance other than 1."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the pictures and adds the PSNR of the picture to the report. Without it they are quick latent previews."),
            ],
            outputs=[
                io.Latent.Output("reconstruction", display_name="reconstruction", tooltip="The reconstructed latent."),
                io.Image.Output("image", display_name="image", tooltip="The reconstructed picture."),
                io.String.Output("report", display_name="report", tooltip="PSNR in dB of the latent and, with a VAE, of the picture."),
                io.Image.Output(
                    "comparison",
                    display_name="comparison",
                    tooltip="Inverted picture, reconstruction and their difference (4 times amplified, gray is none), side by side.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, trajectory, positive=None, negative=None, vae=None) -> io.NodeOutput:
        samples = run_reconstruction(model, trajectory, positive, negative)
        reference = clean_latent(trajectory, model, check=False)["samples"]
        process_in = model.get_model_object("latent_format").process_in
        pictures = to_pictures(model, torch.cat([trajectory.latents[0], process_in(samples)]), vae)
        before, after = pictures.chunk(2)

        lines = [f"Round trip: {trajectory.steps} steps, guidance {trajectory.guidance:g}", f"Latent PSNR: {decibel(psnr(reference, samples))} (peak = range of the latent)"]
        if vae is not None:
            lines.append(f"Picture PSNR: {decibel(psnr(before, after, peak=1.0))} (against the autoencoder's own reconstruction)")
        if len(samples) > 1:
            lines.append("Latent PSNR of each: " + ", ".join(decibel(psnr(a, b)) for a, b in zip(reference, samples)))
        if left_out := trajectory.info.get("left_out"):
            lines.append(f"Note: the file does not hold the conditioning's {', '.join(left_out)}; connect positive to use them.")
        report = "\n".join(lines)

        comparison = torch.cat(
            [
                filmstrip.strip([[(a, "inverted"), (b, "reconstruction"), ((b - a) * DIFFERENCE_GAIN + 0.5, "difference x 4")]])
                for a, b in zip(before, after)
            ]
        )
        latent = {"samples": samples}
        if trajectory.noise_mask is not None:
            latent["noise_mask"] = trajectory.noise_mask.clone()
        return io.NodeOutput(latent, after, report, comparison, ui=show(cls, report, comparison))


NODES = [DDIMInvert, ReconstructCheck]
