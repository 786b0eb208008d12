"""Writes `mnist_model.pt`, a whole pickled module as the PyTorch tutorial's, and its outputs.

    python tests/goldens/make_mnist_model.py

The module's class lives in a module that is not there when the file is read: `mnist_net`.
Run with torch==2.13.0.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = torch.nn.Flatten()
        self.fc1 = torch.nn.Linear(784, 8)
        self.relu1 = torch.nn.ReLU()
        self.fc2 = torch.nn.Linear(8, 8)
        self.relu2 = torch.nn.ReLU()
        self.fc3 = torch.nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu1(self.fc1(self.flatten(x)))
        return self.fc3(self.relu2(self.fc2(x)))


elsewhere = types.ModuleType("mnist_net")
elsewhere.Net = Net
sys.modules["mnist_net"] = elsewhere
Net.__module__ = "mnist_net"

torch.manual_seed(0)
model = Net().eval()
pixels = torch.randint(0, 256, (16, 28, 28), dtype=torch.uint8)
folder = Path(__file__).parent
torch.save(model, folder / "mnist_model.pt")
logits = model(pixels / 255).detach()
np.savez_compressed(folder / "mnist_model.npz", pixels=pixels.numpy(), logits=logits.numpy())
