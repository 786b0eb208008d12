"""Reads, maps to Flax and writes PyTorch files, without PyTorch and without running their code."""

from jaxgrad.torch._mapping.load_into import load_into as load_into
from jaxgrad.torch._mapping.load_into import match as match
from jaxgrad.torch._mapping.report import Entry as Entry
from jaxgrad.torch._mapping.report import MappingError as MappingError
from jaxgrad.torch._mapping.report import Report as Report
from jaxgrad.torch._mapping.rules import Rule as Rule
from jaxgrad.torch._mapping.verify import Comparison as Comparison
from jaxgrad.torch._mapping.verify import verify as verify
from jaxgrad.torch._modules.chain import Chain as Chain
from jaxgrad.torch._modules.chain import Flatten as Flatten
from jaxgrad.torch._modules.from_module import from_module as from_module
from jaxgrad.torch._reading.errors import TorchFileError as TorchFileError
from jaxgrad.torch._reading.module import Module as Module
from jaxgrad.torch._reading.read import Checkpoint as Checkpoint
from jaxgrad.torch._reading.read import read as read
from jaxgrad.torch._writing.save import save_tensors as save_tensors
from jaxgrad.torch._writing.save import save_torch as save_torch
from jaxgrad.torch._writing.save import to_torch as to_torch
