"""Where a script computes, and with what precision.

device = select_device("auto")               # the GPU if there is one
dtype = autocast_dtype("auto", device)       # bfloat16 on GPUs, None (full precision) on CPUs
"""

import ctypes
import re
import shutil

import torch

from tools import parallel
from tools.errors import UserError


def select_device(name: str) -> torch.device:
    """Resolve --device, and prepare the process for it. Processes of torchrun get a GPU each, by their local rank.

    Raises:
        UserError: not one of auto, cpu, cuda and cuda:N, or a GPU that PyTorch does not see, or one for all processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
            print(
                "Warning: a GPU is here, but PyTorch's build is for CPUs. "
                "Replace it: rm -r .venv; TORCH_INDEX= make .venv/installed"
            )
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise UserError(f"--device {name}: not a device. Use auto, cpu, cuda or cuda:N.")
    index = int(match[1] or 0)
    if name != "cpu" and parallel.world_size() > 1:
        if match[1]:
            raise UserError(f"--device {name}: torchrun gives each of its processes a GPU. Use --device cuda.")
        index = parallel.local_rank()
        name = f"cuda:{index}"
    if name != "cpu" and index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs. Use --device cpu or another index."
        )
    if name == "cpu":
        _keep_freed_memory()
    return torch.device(name)


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the system after every operation.

    Getting it back, zeroed page by page, takes a quarter to a half of the time of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
    if mallopt is not None:
        no_limit, trim_threshold, mmap_max = -1, -1, -4
        mallopt(trim_threshold, no_limit)
        mallopt(mmap_max, 0)


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of automatic mixed precision, None for full precision."""
    if mixed_precision == "auto":
        mixed_precision = "bf16" if device.type == "cuda" else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[mixed_precision]
