"""Writes the PyTorch files of this directory, with inputs and the outputs that PyTorch gives.

    python tests/goldens/torch_models/make_torch_models.py

Each `NAME.pt` is a state dict, or a whole module where that is what the test is about; `NAME.npz`
holds inputs and outputs in PyTorch's order of axes. Written with torch 2.13.0.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent


class MLP(nn.Module):
    """The network of the usual MNIST tutorial, narrow, as a class that the file doesn't hold."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(49, 16)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(16, 16)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(0.2)
        self.fc3 = nn.Linear(16, 10)

    def forward(self, x):
        x = self.relu1(self.fc1(x))
        x = self.dropout(self.relu2(self.fc2(x)))
        return self.fc3(x)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5, padding=2)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6 * 2 * 3, 12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 2)
        x = functional.max_pool2d(functional.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """ResNet-18 with torchvision's names, an eighth of a sixteenth as wide."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for i in range(4):
            outputs = width * 2 ** min(i, 2)
            blocks = [
                BasicBlock(inputs, outputs, 1 if i == 0 else 2),
                BasicBlock(outputs, outputs, 1),
            ]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class SequenceClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


def sequential():
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding="same"),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
        ),
        nn.Sequential(
            nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False),
            nn.GroupNorm(4, 8),
            nn.GELU("tanh"),
            nn.AvgPool2d(2, 1, 1),
        ),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.LayerNorm(96),
        nn.Linear(96, 5),
        nn.LogSoftmax(dim=1),
    )


def layers():
    """One of each layer, to the input that it gets."""
    image, line, volume = torch.randn(2, 4, 7, 6), torch.randn(2, 4, 9), torch.randn(2, 4, 5, 4, 6)
    sequence = torch.randn(2, 5, 8)
    return {
        "linear": (nn.Linear(8, 8), sequence),
        "conv1d": (nn.Conv1d(4, 4, 3, padding=2, dilation=2), line),
        "conv2d": (nn.Conv2d(4, 4, (3, 2), stride=(2, 1)), image),
        "conv3d": (nn.Conv3d(4, 4, (2, 3, 1)), volume),
        "grouped": (nn.Conv2d(4, 8, 3, groups=4), image),
        "transposed1d": (nn.ConvTranspose1d(4, 4, 4, stride=3), line),
        "transposed2d": (nn.ConvTranspose2d(4, 4, (3, 2), stride=2), image),
        "transposed3d": (nn.ConvTranspose3d(4, 4, (2, 3, 1)), volume),
        "batchnorm": (nn.BatchNorm2d(4), image),
        "layernorm": (nn.LayerNorm(8), sequence),
        "groupnorm": (nn.GroupNorm(2, 4), image),
        "embedding": (nn.Embedding(7, 7), torch.randint(7, (2, 5))),
        "lstm": (nn.LSTM(8, 8, batch_first=True), sequence),
        "bilstm": (nn.LSTM(8, 4, batch_first=True, bidirectional=True), sequence),
        "gru": (nn.GRU(8, 8, batch_first=True), sequence),
        "rnn": (nn.RNN(8, 8, batch_first=True), sequence),
        "attention": (nn.MultiheadAttention(8, 2, batch_first=True), sequence),
    }


def unsettle(model):
    """Gives every parameter and statistic a value that no initialiser gives."""
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            if name.endswith("running_var"):
                x.uniform_(0.5, 2)
            elif x.ndim <= 1:
                x.add_(torch.randn_like(x) * 0.3)
    return model.eval()


def output(model, x):
    with torch.no_grad():
        y = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
    return (y[0] if isinstance(y, tuple) else y).numpy()


def main():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, activation="gelu")
    models = {
        "lenet": (LeNet(), torch.randn(3, 1, 13, 17)),
        "resnet18": (ResNet18(), torch.randn(2, 3, 33, 40)),
        "encoder": (
            nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
            torch.randn(2, 5, 16),
        ),
        "lstm": (SequenceClassifier(), torch.randint(11, (3, 7))),
    }
    for name, (model, x) in models.items():
        unsettle(model)
        torch.save(model.state_dict(), HERE / f"{name}.pt")
        np.savez(HERE / f"{name}.npz", x=x.numpy(), y=output(model, x))
    whole = {
        "mlp": (MLP(), torch.randn(4, 49)),
        "sequential": (sequential(), torch.randn(2, 3, 8, 12)),
    }
    sys.modules["nowhere"] = sys.modules["__main__"]  # a module that no reader can import
    MLP.__module__ = "nowhere"
    for name, (model, x) in whole.items():
        unsettle(model)
        torch.save(model, HERE / f"{name}.pt")
        np.savez(HERE / f"{name}.npz", x=x.numpy(), y=output(model, x))
    made = {name: (unsettle(layer), x) for name, (layer, x) in layers().items()}
    states = {
        f"{name}.{key}": value
        for name, (layer, _) in made.items()
        for key, value in layer.state_dict().items()
    }
    torch.save(states, HERE / "layers.pt")
    recorded = {}
    for name, (layer, x) in made.items():
        recorded |= {f"{name}.x": x.numpy(), f"{name}.y": output(layer, x)}
    np.savez(HERE / "layers.npz", **recorded)


if __name__ == "__main__":
    main()
