"""Writes `autograd.npz`, PyTorch's numbers for `autograd/test_grad.py`: run with torch==2.13.0.

python tests/goldens/make_autograd.py
"""

from pathlib import Path

import numpy as np
import torch

torch.set_default_dtype(torch.float64)
golden = {}

# The tutorial's vector-Jacobian product.
a = torch.tensor([2.0, 3.0], requires_grad=True)
b = torch.tensor([6.0, 4.0], requires_grad=True)
q = 3 * a**3 - b**2
assert a.grad is None and b.grad is None
q.backward(gradient=torch.tensor([1.0, 1.0]))
golden |= {"q/value": q, "q/a": a.grad, "q/b": b.grad}

# The tutorial's layer, its loss, and its manual update.
generator = torch.Generator().manual_seed(0)
x = torch.randn(1, 3, generator=generator)
w = torch.randn(3, 1, generator=generator, requires_grad=True)
b = torch.randn(1, generator=generator, requires_grad=True)
loss = (1 - (x @ w + b)) / 2
loss.backward()
assert w.grad is not None
golden |= {"layer/x": x, "layer/w": w, "layer/b": b, "layer/loss": loss}
golden |= {"layer/dw": w.grad, "layer/db": b.grad, "layer/stepped": w - 0.1 * w.grad}

# A small classifier, for every kind of model: x -> tanh -> logits, mean cross entropy.
x = torch.randn(8, 5, generator=generator)
labels = torch.randint(0, 3, (8,), generator=generator)
trunk = torch.nn.Linear(5, 4)
head = torch.nn.Linear(4, 3)
logits = head(torch.tanh(trunk(x)))
loss = torch.nn.functional.cross_entropy(logits, labels)
loss.backward()
golden |= {"net/x": x, "net/labels": labels, "net/loss": loss}
for name, layer in {"trunk": trunk, "head": head}.items():
    golden |= {f"net/{name}/weight": layer.weight, f"net/{name}/bias": layer.bias}
    golden |= {f"net/{name}/dweight": layer.weight.grad, f"net/{name}/dbias": layer.bias.grad}

# Ten steps of SGD with momentum on random data, as the tutorial re-trains its model.
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(784, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
model.float()  # a start that is exact in 32 bits halves the file
golden |= {f"sgd/start/{k}": v.clone() for k, v in model.state_dict().items()}
model.double()
pixels = torch.randint(0, 256, (64, 784), dtype=torch.uint8)
labels = torch.rand(64, 10)
golden |= {"sgd/pixels": pixels, "sgd/labels": labels}
data = pixels / 256
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
losses = []
for _ in range(10):
    loss = (model(data) - labels).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss)
golden |= {f"sgd/end/{k}": v for k, v in model.state_dict().items()}
golden |= {"sgd/losses": torch.stack(losses), "sgd/argmax": model(data).argmax(1)}

arrays = {name: value.detach().numpy() for name, value in golden.items()}
np.savez_compressed(Path(__file__).with_name("autograd.npz"), **arrays)
