"""Choice of the machine's part of a command: device and threads."""

from typing import Literal, get_args

import torch

Device = Literal["auto", "cpu", "cuda", "mps"]


def setup_device(device: Device = "auto", threads: int | None = None) -> torch.device:
    """The device to use, after setting the number of CPU threads of this process if `threads` is given.

    "auto" takes the first that is there of cuda, mps, cpu.

    Raises:
        ValueError: an unknown device, one that this machine or this build of torch does not have, or threads below 1.
    """
    if device not in get_args(Device):
        raise ValueError(f"device={device!r} must be one of {', '.join(get_args(Device))}; use device='auto'")
    if threads is not None:
        if type(threads) is not int or threads < 1:
            raise ValueError(f"threads={threads!r} must be an integer of at least 1; use threads=1")
        torch.set_num_threads(threads)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[device]:
        raise ValueError(f"device={device!r} is not available to this build of torch; use device='cpu'")
    return torch.device(device)
