"""A process of its own as a fork of this one, where that is safe: to start Python takes longer than most work."""

import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import torch


def safe() -> bool:
    """Whether what is computed by now goes on in a fork: neither threads of OpenMP nor a device do."""
    return sys.platform == "linux" and torch.get_num_threads() == 1 and not torch.accelerator.is_available()


def start(work: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A process, already running, that calls ``work``, a function of a module; a fresh one where no fork is safe."""
    process = multiprocessing.get_context("fork" if safe() else "spawn").Process(target=work, args=arguments)
    process.start()
    return process
