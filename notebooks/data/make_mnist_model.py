"""Writes what `01_autograd.ipynb` has of PyTorch: a trained module and what PyTorch does with it.

    python notebooks/data/make_mnist_model.py

`mnist_model.pt` is a whole pickled module, trained on scikit-learn's digits at 28 x 28; its class
lives in a module that is not there when the file is read. `mnist_model.npz` has its outputs on
noise, and the losses of ten steps of SGD with the calls of a step in four orders. Run with
torch==2.13.0.
"""

import copy
import sys
import types
from pathlib import Path

import numpy as np
import torch

from jaxgrad.data import digits, noise


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = torch.nn.Flatten()
        self.fc1 = torch.nn.Linear(784, 16)
        self.relu1 = torch.nn.ReLU()
        self.fc2 = torch.nn.Linear(16, 16)
        self.relu2 = torch.nn.ReLU()
        self.fc3 = torch.nn.Linear(16, 10)

    def forward(self, x):
        x = self.relu1(self.fc1(self.flatten(x)))
        return self.fc3(self.relu2(self.fc2(x)))


elsewhere = types.ModuleType("mnist_net")
elsewhere.Net = Net
sys.modules["mnist_net"] = elsewhere
Net.__module__ = "mnist_net"

torch.manual_seed(0)
model = Net()
train = {name: torch.from_numpy(array) for name, array in digits().train.items()}
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
for _ in range(60):
    for rows in torch.randperm(len(train["label"])).split(64):
        optimizer.zero_grad()
        logits = model(train["image"][rows])
        torch.nn.functional.cross_entropy(logits, train["label"][rows].long()).backward()
        optimizer.step()

rows = {name: torch.from_numpy(array) for name, array in noise(64, seed=0).items()}
recorded = {"logits": model(rows["image"]).detach()}


def losses(of, calls, steps, rate, looks=0):
    """The losses of some steps of SGD, with the calls of a step in this order."""
    net = copy.deepcopy(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    for _ in range(looks):
        of(net).backward()
    seen = []
    for _ in range(steps):
        loss = of(net)
        seen.append(loss.detach())
        for call in calls:
            {"zero": optimizer.zero_grad, "backward": loss.backward, "step": optimizer.step}[call]()
    return torch.stack(seen)


def tutorial(net):
    return (net(rows["image"]) - rows["target"]).sum()


def squares(net):
    return ((net(rows["image"]) - rows["target"]) ** 2).mean()


recorded["tutorial"] = losses(tutorial, ("zero", "backward", "step"), 5, 1e-2)
# Each starts with the gradients of ten looks at the loss, which only the first order clears.
for order in ("zero backward step", "backward step zero", "backward step", "backward zero step"):
    recorded[order] = losses(squares, order.split(), 40, 1e-3, looks=10)

folder = Path(__file__).parent
torch.save(model.eval(), folder / "mnist_model.pt")
arrays = {name: value.numpy() for name, value in recorded.items()}
np.savez_compressed(folder / "mnist_model.npz", **arrays)
