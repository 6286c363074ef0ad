"""An instruction: the output of a text encoder, of which some positions were learned."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# How far two encodings of the empty text may lie apart, relative to their size. Rounding to bf16 makes about 1 %; an encoder of other weights,
# or another layer of the same, far more.
SAME_ENCODER = 0.25


def plain(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU that is no inference tensor, so that it may be trained later."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


@dataclass(frozen=True, eq=False)
class Instruction:
    """tokens: [1, T, C] float32 on the CPU, what takes the place of an encoded text. null: [1, T, C], the same encoder's empty text.

    end: position of the first end token, so 1 to end - 1 are what can be learned; None where a file does not tell.
    text: what was encoded at the start. pooled: [1, P], the pooled vector of SDXL's encoders. info: figures of the learning, JSON-able.

    Raises ValueError, one sentence, when the parts do not fit together.
    """

    tokens: Tensor
    null: Tensor
    end: int | None
    text: str = ""
    pooled: Tensor | None = None
    info: dict = field(default_factory=dict)

    def __post_init__(self):
        tokens, null = self.tokens, self.null
        if tokens.ndim != 3 or len(tokens) != 1 or 0 in tokens.shape or tokens.shape != null.shape:
            raise ValueError(f"An instruction and its empty text are tokens of shape [1, T, C], but these are {list(tokens.shape)} and {list(null.shape)}.")
        if not bool(torch.isfinite(tokens).all()) or not bool(torch.isfinite(null).all()):
            raise ValueError("The instruction holds NaN or infinite values: learn it again.")
        if self.end is not None and not 1 <= self.end < tokens.shape[1]:
            raise ValueError(f"An instruction of {tokens.shape[1]} positions ends between 1 and {tokens.shape[1] - 1}, not at {self.end}.")
        for name in ("tokens", "null", "pooled"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def width(self) -> int:
        """Values per token."""
        return self.tokens.shape[-1]

    @property
    def conditioning(self) -> list:
        """Host CONDITIONING, fresh at every call."""
        options = {} if self.pooled is None else {"pooled_output": self.pooled.clone()}
        return [[self.tokens.clone(), options]]

    def with_tokens(self, tokens: Tensor, **changes) -> Instruction:
        """The same with other tokens."""
        return replace(self, tokens=tokens, **changes)


def check_same_encoder(instruction: Instruction, null: Tensor, what: str) -> None:
    """Raises ValueError, one sentence, unless `null` [1, T, C], an empty text, comes from the instruction's text encoder. what: whose it is."""
    found, own = plain(null), instruction.null
    if found.shape != own.shape:
        raise ValueError(
            f"The instruction comes from another text encoder: it has {own.shape[1]} tokens of {own.shape[2]} values, but {what} gives {found.shape[1]} of "
            f"{found.shape[2]}; use the CLIP of the checkpoint it was learned with."
        )
    distance = float((found - own).norm() / own.norm().clamp(min=1e-12))
    if distance > SAME_ENCODER:
        raise ValueError(
            f"The instruction comes from another text encoder (or layer of it) than {what}, their empty texts differ by {100 * distance:.0f} %: "
            "use the CLIP of the checkpoint it was learned with."
        )
