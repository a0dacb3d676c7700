"""Choice of the machine's part of a run: device and threads."""

from typing import Literal, get_args

import torch

from open_mythos.train.checks import check_choice, check_int

Device = Literal["auto", "cpu", "cuda", "mps"]


def setup_device(device: Device = "auto", threads: int | None = None) -> torch.device:
    """The device to use, after setting the number of CPU threads of this process if `threads` is given.

    "auto" takes the first that is there of cuda, mps, cpu.

    Raises:
        ValueError: an unknown device, one that this machine or this build of torch does not have, or threads below 1.
    """
    check_choice("device", device, get_args(Device))
    if threads is not None:
        check_int("threads", threads, 1)
        torch.set_num_threads(threads)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[device]:
        raise ValueError(f"device={device!r} is not available to this build of torch; use device='cpu'")
    return torch.device(device)
