"""Runs a command as one of several processes, on one host or many."""

import dataclasses
from typing import Annotated

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.console import Console

from jaxgrad._devices.processes import is_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed:
    """Options of a command that runs as several processes, the same for each but --process-id."""

    distributed: bool = False
    """Train on all devices of all processes. On Slurm, Open MPI, Kubernetes and TPU pods they find
    each other; elsewhere pass --coordinator, --num-processes and --process-id."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """The address at which process 0 listens."""
    num_processes: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """The number of processes."""
    process_id: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """The index of this process, from 0."""

    def join(self) -> Console:
        """Joins the other processes, before anything else; only the first one's console prints."""
        explicit = (self.coordinator, self.num_processes, self.process_id)
        if any(x is not None for x in explicit) and (not self.distributed or None in explicit):
            raise ValueError(
                "--coordinator, --num-processes and --process-id belong together, and to "
                "--distributed."
            )
        if self.distributed and not jax.distributed.is_initialized():
            try:
                jax.distributed.initialize(*explicit)
            except (ValueError, RuntimeError) as e:
                raise ValueError(
                    f"--distributed: the processes don't find each other ({e}). Pass their "
                    "address and number: --coordinator HOST:PORT --num-processes N --process-id I."
                ) from e
        return Console(soft_wrap=True, quiet=self.distributed and not is_first())

    def mesh(self) -> Mesh | None:
        """All devices of all processes; None without --distributed."""
        return Mesh(np.array(jax.devices()), ("data",)) if self.distributed else None
