r"""A model's forward pass with the calls replaced that would lose a derivative or a digit.

    layer_norm(x) = (x − m)/√(var + ε)·w + b,    m = mean x,  var = mean (x − m)²

torch's own layer norm is right in value and in first derivatives, but its forward rule is wrong as soon as a second derivative goes
through it (forward over forward, reverse over forward). In plain operations every derivative exists. The model itself is left
alone: a call is replaced while the mode is on, whoever makes it, and only there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Rewrites(TorchFunctionMode):
    """Within: `torch.nn.functional.layer_norm` in plain operations, and with `float64` no cast of float64 tensors to float32.

    Model code casts norms, softmax and rotary factors to float32 whatever the model's dtype; in a float64 model this rounds every
    activation and a finite difference sees the rounding instead of the derivative.
    """

    def __init__(self, *, float64: bool) -> None:
        super().__init__()
        self.float64 = float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or what replaces it."""
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.layer_norm:
            return _layer_norm(*args, **kwargs)
        if self.float64 and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args = tuple(a for a in args if a is not torch.float32)
                if (
                    len(args) == 1
                    and set(kwargs) <= {"dtype"}
                    and kwargs.get("dtype", torch.float32) is torch.float32
                ):
                    return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm; 16-bit input is normalised in float32 and rounded once, as there."""
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    centred = x - x.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(input.dtype)
