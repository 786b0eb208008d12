"""Draws the pictures of the README and the docs: `python docs/images/make.py`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxgrad as jg
from jaxgrad.models import MLP, ViT


def draw(name, model, image, wrt):
    apply, params = jg.functional(model)

    def loss(params, batch):
        logits = apply(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    rows = image[0]
    batch = {
        "image": jax.ShapeDtypeStruct(image, jnp.float32),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    picture = jg.graph(loss, params, batch, wrt=wrt)
    picture.save(Path(__file__).parent / f"{name}.svg")


if __name__ == "__main__":
    draw("mlp", MLP(784, (512, 512, 256), 10, rngs=nnx.Rngs(0)), (64, 28, 28), "head/**")
    wrt = ["layers/11/**", "norm/**", "head/**"]
    draw("vit", nnx.eval_shape(lambda: ViT(rngs=nnx.Rngs(0))), (64, 28, 28, 1), wrt)
