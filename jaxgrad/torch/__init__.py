"""PyTorch files without PyTorch: read them, without running them, as NumPy arrays."""

from jaxgrad.torch._errors import TorchFileError as TorchFileError
from jaxgrad.torch._module import Module as Module
from jaxgrad.torch._read import Checkpoint as Checkpoint
from jaxgrad.torch._read import read as read
