"""PyTorch files without PyTorch: read without running them, mapped to Flax, and written."""

from jaxgrad.torch._build import from_module as from_module
from jaxgrad.torch._chain import Chain as Chain
from jaxgrad.torch._chain import Flatten as Flatten
from jaxgrad.torch._errors import TorchFileError as TorchFileError
from jaxgrad.torch._map import load_into as load_into
from jaxgrad.torch._map import match as match
from jaxgrad.torch._module import Module as Module
from jaxgrad.torch._names import Rule as Rule
from jaxgrad.torch._read import Checkpoint as Checkpoint
from jaxgrad.torch._read import read as read
from jaxgrad.torch._report import Entry as Entry
from jaxgrad.torch._report import MappingError as MappingError
from jaxgrad.torch._report import Report as Report
from jaxgrad.torch._save import save_tensors as save_tensors
from jaxgrad.torch._save import save_torch as save_torch
from jaxgrad.torch._save import to_torch as to_torch
from jaxgrad.torch._verify import Comparison as Comparison
from jaxgrad.torch._verify import verify as verify
