"""Per-sample gradient dot products in a bare training loop: a small MLP, synthetic data, ten steps.

Two of the eight samples in every batch carry a wrong label. Their dot products with the validation gradient are
mostly negative: a step along their gradient raises the validation loss.

    python examples/ghost/ghost_mlp.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_gradtools import GhostDotProd


STEPS, BATCH, WRONG, INPUTS, HIDDEN, CLASSES = 10, 8, 2, 16, 32, 3


def make_batch(centres: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    y = torch.randint(CLASSES, (size,))
    return {"x": centres[y] + torch.randn(size, INPUTS), "y": y}


def validation_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch["x"]), batch["y"])


def main() -> None:
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, INPUTS)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.LayerNorm(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = make_batch(centres, 64)
    all_dots = []

    print("step  train loss  val loss   dot product of each sample (the last two have a wrong label)")
    with GhostDotProd(model, loss_fn=validation_loss) as engine:
        for step in range(1, STEPS + 1):
            batch = make_batch(centres, BATCH)
            batch["y"][-WRONG:] = (batch["y"][-WRONG:] + 1) % CLASSES

            engine.validate(validation)  # the validation gradient at these weights
            loss = cross_entropy(model(batch["x"]), batch["y"])
            loss.backward()
            scores = engine.scores()  # before the optimizer's step

            all_dots.append(scores.dots[0])
            dots = " ".join(f"{dot:+.3f}" for dot in scores.dots[0])
            with torch.no_grad():
                print(f"{step:4}  {loss.item():10.3f}  {validation_loss(model, validation).item():8.3f}   {dots}")
            if step < STEPS:
                optimizer.step()
                optimizer.zero_grad()

        right, wrong = torch.stack(all_dots).split([BATCH - WRONG, WRONG], dim=1)
        print(f"mean dot product of right labels {right.mean():+.3f}, of wrong labels {wrong.mean():+.3f}")

        print("\nlast step, by layer")
        for layer, layer_dots in zip(engine.layers, scores.layer_dots[:, 0], strict=True):
            dots = " ".join(f"{dot:+.4f}" for dot in layer_dots)
            print(f"{layer.name:>10}  {dots}   sum {layer_dots.sum():+.5f}")

        print("\nand by parameter, summed over the batch: what autograd's own gradient gives")
        for name, parameter in model.named_parameters():
            print(f"{name:>10}  {(parameter.grad * engine.target(parameter)[0]).sum():+.5f}")


if __name__ == "__main__":
    main()
