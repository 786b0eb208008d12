"""Trains the models of `04_from_pytorch.ipynb` on the digits 0 to 4, in PyTorch.

    pip install torch==2.13.0
    python notebooks/data/make_from_pytorch.py

Each `NAME.pt` is a state dict, `NAME.npz` holds inputs and what PyTorch gives for them.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from jaxgrad.data import digits

HERE = Path(__file__).parent


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 7 * 7, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x[:, None]))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


class Transformer(nn.Module):
    """Reads a picture as a sequence of its 28 rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(28, 32)
        self.positions = nn.Parameter(torch.randn(28, 32) / 5)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.positions).mean(1))


def main():
    train, test = digits(range(5))
    x, y = (torch.from_numpy(np.asarray(train[k])) for k in ("image", "label"))
    for name, make in {"cnn": CNN, "transformer": Transformer}.items():
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows].long()).backward()
                optimizer.step()
        inputs = np.asarray(test["image"])[:64]
        with torch.no_grad():
            outputs = model.eval()(torch.from_numpy(inputs)).numpy()
        torch.save(model.state_dict(), HERE / f"{name}.pt")
        np.savez_compressed(HERE / f"{name}.npz", x=inputs, y=outputs)
        print(name, (outputs.argmax(1) == np.asarray(test["label"])[:64]).mean())


if __name__ == "__main__":
    main()
