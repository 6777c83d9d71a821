"""Commands on GPUs: options, the namespace of the arrays, and when the device is done."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any

import numpy as np

from .. import kernels
from ..errors import InputError
from ..messages.device.channel import MODES
from ..messages.hosts import use_gpu
from ..messages.message import Communicator, virtual_time

KINDS = ("numpy", "cupy")


def add_arguments(
    parser: argparse.ArgumentParser, default: str = "numpy, or what the kernel works on", gradients: bool = True
) -> None:
    """Add the options that say on what arrays and by what kernel blocks are computed, and how messages go.

    Parameters
    ----------
    parser
    default : str
        What arrays there are by default.
    gradients : bool
        Whether an algorithm of the command goes backward.
    """
    group = parser.add_argument_group("GPUs")
    group.add_argument("--arrays", choices=KINDS, help=f"cupy: on GPUs (default {default})")
    names = sorted({name for kind in KINDS for name in kernels.KERNELS[kind]})
    group.add_argument("--kernel", choices=names, help="default the fastest that can do the problem")
    group.add_argument("--gpu-messages", choices=MODES, default="auto", help="of device memory, or through the host")
    if gradients:
        group.add_argument(
            "--deterministic", action="store_true", help="gradients that are the same bits from run to run"
        )


def namespace(args: argparse.Namespace, comm: Communicator, otherwise: str = "numpy") -> ModuleType:
    """Return NumPy, or CuPy with one of the host's GPUs as this rank's own.

    Raises
    ------
    InputError
        On every rank, where GPUs are asked for and one has none, or only their messages are.
    """
    of_kernel = next((kind for kind in KINDS if args.kernel in kernels.KERNELS[kind]), otherwise)
    if (args.arrays or of_kernel) == "numpy":
        if args.gpu_messages != "auto":
            raise InputError(f"--gpu-messages {args.gpu_messages} goes with --arrays cupy")
        return np
    if virtual_time() is not None:
        raise InputError("virtual ranks have no GPUs: leave out --virtual, or --arrays and --kernel")
    return use_gpu(comm)


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what an algorithm is built with."""
    given = {"kernel": args.kernel, "gpu_messages": args.gpu_messages}
    return {**given, "deterministic": True} if getattr(args, "deterministic", False) else given


def wait(xp: ModuleType) -> None:
    """Wait until the device has nothing more to do."""
    if xp is not np:
        xp.cuda.Device().synchronize()
