"""The experts' products on tensor cores: which they are, and calls of the kernels.

Kernels of csrc/cuda/products gather rows, apply bias and activation, and read the experts' bounds
on the device: a call never waits for it. They multiply as `mma.sync` does, on compute capability
8.0 and up:

    bfloat16, float16   products exact, summed in float32
    float32             as TF32 where torch allows that for its own products
                        (torch.backends.cuda.matmul), else as three products of TF32, with an
                        error below 2e-6 of the terms' sizes in the emulator, whose sums round as
                        documented (no card has run them). An infinity gives NaN, and so does a
                        number that is rounded to one, within 2^-12 of the largest

Weights in 8 and 4 bits become numbers of the rows' dtype, of 16 bits, a slice at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("grouped_mm", "quantized_mm", "grouped_outer", "feed_forward", "feed_forward_backward")
_TAKEN = (torch.float32, torch.bfloat16, torch.float16)
LEAST_MAJOR = 8  # compute capability


def is_built(device_type: str) -> bool:
    """Whether a library has the kernels; on the CPU, the emulated ones."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    name = "moe_ext::tensor_grouped_mm"
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def why_not(rows: Tensor, widths: tuple[int, ...]) -> str | None:
    """Why the kernels do not take products of such rows, None where they do.

    widths: of all operands' rows
    """
    if not is_built(rows.device.type):
        return "no kernels for tensor cores are built"
    if rows.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(rows.device)
        if major < LEAST_MAJOR:
            return f"ours need compute capability {LEAST_MAJOR}.0, not {major}.{minor}"
    if rows.dtype not in _TAKEN:
        return f"ours do not take {rows.dtype}"
    if any(width == 0 or width * rows.element_size() % 16 for width in widths):
        return f"ours take rows of a multiple of 16 bytes, not {widths} values"
    return None


def why_not_packed(rows: Tensor, values: Tensor, width: int) -> str | None:
    """The same for weights [E, N, bytes] in 8 or 4 bits; width: of the result."""
    if why := why_not(rows, (rows.shape[1], width)):
        return why
    if rows.element_size() != 2:
        return f"ours take rows of 16 bits, not {rows.dtype}"
    if values.shape[2] % 16 or not len(values):
        return f"ours take lines of a multiple of 16 bytes, not {list(values.shape)}"
    return None


def operator(name: str) -> Callable:
    """An operator of NAMES on tensor cores, with the arguments of its contract."""
    overload = getattr(torch.ops.moe_ext, f"tensor_{name}").default

    def run(*args):
        return overload(*args, torch.backends.cuda.matmul.fp32_precision == "tf32")

    return run
