"""The options device, dtype and threads of a command. Torch is imported only when a device is set up."""

import ctypes
import platform
from typing import TYPE_CHECKING, Literal, get_args

from open_mythos.checks import check_choice, check_int

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
AutoDtype = Literal["auto", Dtype]
"""A dtype, or "auto": the faster one here, by `ops.routes.faster_dtype` for a model that answers and by
`train.dtypes` for a run."""


def setup_device(device: Device = "auto", threads: int | None = None) -> "torch.device":
    """Return the device to use, and set the number of CPU threads of this process if `threads` is given.

    "auto" is the first available one of cuda, mps and cpu.

    Raises:
        TypeError: threads is no int.
        ValueError: an unknown device, one that this machine or this build of torch does not have, or threads below 1.
    """
    import torch

    check_choice("device", device, get_args(Device))
    if threads is not None:
        check_int("threads", threads, 1)
        torch.set_num_threads(threads)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[device]:
        raise ValueError(f"device={device!r} is not available to this build of torch; use device='cpu'")
    if device == "cpu":
        keep_freed_memory()
    return torch.device(device)


def keep_freed_memory() -> bool:
    """Let the C library of Linux reuse freed memory for the next tensor; return whether the library has this setting.

    By default large blocks go back to the system at once, and every new tensor is mapped in again page by page, which
    is a tenth of a training step's time. With this setting the process occupies its peak of memory until it ends.
    """
    trim_threshold, mmap_threshold = -1, -3  # names in malloc.h
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 2**30))
