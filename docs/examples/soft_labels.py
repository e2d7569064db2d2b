"""Soft against hard labels on points in the plane: a small student of a larger teacher, a minute on one core.

    PYTHONPATH=. python docs/examples/soft_labels.py

A teacher learns to tell two interleaved half-moons with noise apart. A student of a fraction of its size then learns
from few of its answers: once from its decisions (alpha = 0), once from its probabilities too (alpha = 0.9, T = 4),
through `pipeline.student.losses.distillation_loss`. Printed, over ten draws of the points (or as many as a number
at the command's end says): accuracy on fresh points and agreement with the teacher, mean and standard error. Whatever
the figures are, they are printed.
"""

import math
import statistics
import sys

import torch
from torch import nn

from pipeline.student.losses import distillation_loss

DRAWS = 10
FEW, MANY = 24, 4000
"""Points that the student learns from, and that both are measured on."""


def moons(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` points (count, 2) of two half-moons with noise, and which of them each is on."""
    labels = torch.randint(0, 2, (count,), generator=generator)
    angles = math.pi * torch.rand(count, generator=generator)
    x, y = torch.cos(angles), torch.sin(angles)
    points = torch.stack([torch.where(labels == 0, x, 1 - x), torch.where(labels == 0, y, 0.5 - y)], dim=1)
    return points + 0.25 * torch.randn(count, 2, generator=generator), labels


def network(width: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


def train(
    model: nn.Sequential, points: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, alpha: float, steps: int
) -> None:
    """Fit a model to a teacher's logits and to labels."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = distillation_loss(model(points), teacher, labels, temperature=4.0, alpha=alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure(seed: int) -> dict[str, tuple[float, float]]:
    """One draw: way of learning -> accuracy, agreement with the teacher."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    points, labels = moons(2000, generator)
    teacher = network(64)
    train(teacher, points, torch.zeros(len(points), 2), labels, 0.0, 300)
    few, _ = moons(FEW, generator)
    fresh, truth = moons(MANY, generator)
    with torch.no_grad():
        told, decided = teacher(few), teacher(fresh).argmax(1)
    found = {"teacher": ((decided == truth).double().mean().item(), 1.0)}
    start = network(8)
    for name, alpha in (("hard labels", 0.0), ("soft labels", 0.9)):
        student = network(8)
        student.load_state_dict(start.state_dict())
        train(student, few, told, told.argmax(1), alpha, 400)
        with torch.no_grad():
            answers = student(fresh).argmax(1)
        found[name] = ((answers == truth).double().mean().item(), (answers == decided).double().mean().item())
    return found


def main(count: int) -> None:
    """Print mean and standard error over so many draws, of which there must be two."""
    draws = [measure(seed) for seed in range(count)]
    print(f"{'learned from':14} {'accuracy':>16} {'agreement':>16}   ({FEW} points, {count} draws)")
    for name in draws[0]:
        cells = []
        for index in (0, 1):
            values = [draw[name][index] for draw in draws]
            error = statistics.stdev(values) / math.sqrt(len(values))
            cells.append(f"{statistics.mean(values):8.4f} ± {error:.4f}")
        print(f"{name:14} {cells[0]:>16} {cells[1]:>16}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else DRAWS)
