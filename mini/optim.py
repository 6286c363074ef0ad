"""Training state shared by every member of the family: Muon and AdamW, an averaged copy, a learning-rate plan by the clock.

The plan is warm-up, constant, then a linear cool-down over the last part of the minutes asked for. The state is saved
every few minutes until the cool-down starts, so a later call continues at the constant rate as if the earlier one had not stopped.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WARMUP = 200  # steps, where nothing else is asked for
COOLDOWN = 0.35  # fraction of the minutes asked for
SAVE_EVERY = 300.0  # seconds
PAUSE = 60.0  # seconds without a step after which the process was suspended, not slow


class Trainer:
    """One run over `module` that can be stopped and resumed.

    `folder` holds `state.safetensors` (weights, average, optimiser moments), `state.json` (counters) and `curve.csv`.
    `minutes` is wall-clock time for this call; `decay` is the per-step decay of the average (EMA). `muon` names the weights
    that Muon updates (Jordan et al. 2024; convolutions as matrices [out, in * kh * kw]), at AdamW's step size (Liu et al.
    2025, section 2.2); AdamW has the others. `warmup`: steps in which the learning rate grows to `lr`, None for the usual number.
    """

    def __init__(self, module: torch.nn.Module, folder: Path, minutes: float, lr: float, seed: int, decay: float = 0.999,
                 muon: Collection[str] = (), warmup: int | None = None):
        self.module, self.folder, self.lr, self.decay, self.warmup = module, Path(folder), lr, decay, warmup or WARMUP
        self.folder.mkdir(parents=True, exist_ok=True)
        self.named = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().clone() for k, p in self.named.items()}
        rest = [p for k, p in self.named.items() if k not in muon]
        self.optimizer = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
        self.optimizers = [self.optimizer]
        # The same memory seen as matrices: torch's Muon takes nothing else.
        self.matrices = {k: torch.nn.Parameter(p.detach().view(len(p), -1)) for k, p in self.named.items() if k in muon}
        if self.matrices:
            self.optimizers.append(torch.optim.Muon(self.matrices.values(), lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self.generator = torch.Generator().manual_seed(seed)
        self.step = self.images = self.reported_images = 0
        self.seed, self.seconds = seed, 60.0 * minutes
        self.start = self.reported = self.stepped = time.monotonic()
        self.losses: list[float] = []
        self.loss = float("nan")  # mean over the last line of the curve
        self.lines = 0  # of the curve that belong to this run
        self.saved, self.cooling = self.start, False

    # -- state ---------------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Load the newest state of `folder`; False when there is none."""
        if not (self.folder / "state.json").exists():
            print("starting a new run", flush=True)
            return False
        counters = json.loads((self.folder / "state.json").read_text())
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for k, p in self.named.items():
                # a part that the recipe has gained since the state was written starts anew
                if f"weight.{k}" not in tensors:
                    print(f"not in the state, so it starts anew: {k}", flush=True)
                    continue
                p.copy_(tensors[f"weight.{k}"])
                self.average[k].copy_(tensors[f"average.{k}"])
                if f"m.{k}" not in tensors:
                    continue
                if k in self.matrices:
                    matrix = self.matrices[k]
                    self.optimizers[1].state[matrix] = {"momentum_buffer": tensors[f"m.{k}"].to(p.device).view_as(matrix)}
                    continue
                self.optimizer.state[p] = {"step": torch.tensor(float(counters["step"])),
                                           "exp_avg": tensors[f"m.{k}"].to(p.device), "exp_avg_sq": tensors[f"v.{k}"].to(p.device)}
        self.step, self.images, self.lines = counters["step"], counters["images"], 1
        self.reported_images = self.images
        # A fresh stream of random numbers: replaying the first one would show the same batches again.
        self.generator.manual_seed(self.seed + self.step)
        print(f"resumed at step {self.step}, {self.images} images", flush=True)
        return True

    def save(self) -> None:
        """Write the state to `folder`; each file is whole or the old one. Raises OSError when it cannot be written."""
        tensors = {}
        for k, p in self.named.items():
            tensors |= {f"weight.{k}": p.detach(), f"average.{k}": self.average[k]}
            # A weight that the loss never reached (the text projection, say) has no moments.
            if state := self.optimizer.state.get(p):
                tensors |= {f"m.{k}": state["exp_avg"], f"v.{k}": state["exp_avg_sq"]}
            elif k in self.matrices and (state := self.optimizers[1].state.get(self.matrices[k])):
                tensors[f"m.{k}"] = state["momentum_buffer"].view_as(p)
        self.saved = time.monotonic()
        partial = self.folder / "state.partial"
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial)
        partial.replace(self.folder / "state.safetensors")
        (self.folder / "state.json").write_text(json.dumps({"step": self.step, "images": self.images}))

    @contextlib.contextmanager
    def saving(self):
        """Context of the training loop: Ctrl-C saves the state, says what was kept, and goes on as KeyboardInterrupt."""
        try:
            yield
        except KeyboardInterrupt:
            if self.cooling:
                kept = "the state from before the cool-down is kept, and the cool-down will be run again"
            else:
                self.save()
                kept = "the state is saved"
            print(f"\nstopped at step {self.step}: {kept}; the same command goes on from there", flush=True)
            raise

    # -- one step ------------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Fraction of this call's minutes that is used up, above 1 at the end."""
        return (time.monotonic() - self.start) / self.seconds

    def _skip_pause(self) -> None:
        """Time in which the process was suspended (Ctrl-Z, say) does not use up its minutes."""
        now = time.monotonic()
        if now - self.stepped > PAUSE:
            self.start += now - self.stepped
            # a pause inside a step that reported after it is no later than now
            self.reported = min(now, self.reported + now - self.stepped)
        self.stepped = now

    def update(self, loss: torch.Tensor, images: int) -> bool:
        """Back-propagate `loss`, step, average; False once the minutes are used up."""
        self._skip_pause()
        progress = self.progress
        cooling = progress >= 1 - COOLDOWN
        if self.step and not self.cooling and (cooling or time.monotonic() - self.saved > SAVE_EVERY):
            self.save()
        self.cooling = cooling
        rate = min(1.0, (self.step + 1) / self.warmup) * min(1.0, max(0.0, (1 - progress) / COOLDOWN))
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        for k, matrix in self.matrices.items():
            grad = self.named[k].grad
            matrix.grad = None if grad is None else grad.reshape(matrix.shape)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
            optimizer.step()
        self.step += 1
        self.images += images
        # The average forgets its start quickly while it is young.
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.named.values()], 1 - decay)
        self.losses.append(loss.item())
        if time.monotonic() - self.reported > 15:
            self.report()
        return progress < 1

    def report(self) -> None:
        """Print a line and add it to curve.csv (step, images, mean loss since the last line); nothing where no step was made since."""
        # The last update may just have reported.
        if not self.losses:
            return
        now = time.monotonic()
        rate = (self.images - self.reported_images) / (now - self.reported)
        mean = sum(self.losses) / len(self.losses)
        print(f"step {self.step}  images {self.images}  loss {mean:.5f}  {rate:.0f} images/s  {100 * self.progress:.0f} % of the time", flush=True)
        # a new run starts a new curve
        with open(self.folder / "curve.csv", "a" if self.lines else "w", encoding="utf-8") as file:
            file.write(f"{self.step},{self.images},{mean:.6f}\n")
        self.losses, self.reported, self.reported_images, self.loss, self.lines = [], now, self.images, mean, self.lines + 1

    def record(self, batch: int) -> dict:
        """What the weights' metadata says about the run."""
        return {"steps": self.step, "images": self.images, "seed": self.seed, "learning_rate": self.lr, "batch": batch, "ema_decay": self.decay,
                "final_loss": round(self.loss, 6), "device": next(iter(self.named.values())).device.type, "torch": torch.__version__}

    def averaged(self) -> dict[str, torch.Tensor]:
        """State dict of the averaged weights, buffers included."""
        return {**{k: v.detach() for k, v in self.module.state_dict().items()}, **self.average}
