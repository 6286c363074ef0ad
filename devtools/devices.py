"""Whether there is something faster than the CPU."""


def accelerator() -> bool:
    """True if torch sees a graphics card that ComfyUI uses by itself (CUDA or ROCm, Apple's, Intel's)."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
