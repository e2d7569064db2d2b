"""A digit that the student never saw: Hinton's omitted class on the handwritten digits of scikit-learn.

    PYTHONPATH=. python docs/examples/omitted_class.py

A teacher learns all ten digits. A student learns from examples without a single 3 (Hinton et al. 2015,
arXiv:1503.02531, section 3): once from their labels, once from the teacher's soft answers to them, which say how much
like a 3 each of them looks. Since a 3 is never the right answer there, the student gives it too rarely; as in the
paper, that class's bias is then raised, here until it is answered as often as it occurs. That needs nobody's label.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from pipeline.student.losses import distillation_loss

OMITTED = 3
TEMPERATURE = 8.0
TEST = 597
"""Images of the 1,797 that nobody learns from."""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 64) with values from 0 to 1, shuffled, and the digit on each."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def network(width: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def train(
    model: nn.Sequential, images: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, alpha: float
) -> None:
    """Fit a model to a teacher's logits and to labels."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-5)
    for _ in range(400):
        loss = distillation_loss(model(images), teacher, labels, temperature=TEMPERATURE, alpha=alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def bias_for(logits: torch.Tensor, share: float) -> float:
    """What to add to the omitted class's logits so that it is answered in that share of the images."""
    others = logits.clone()
    others[:, OMITTED] = -torch.inf
    lacking = others.max(1).values - logits[:, OMITTED]  # where it is more than this, the class wins
    return float(lacking.sort().values[round(share * len(lacking))])


def measure(seed: int = 0) -> dict[str, tuple[float, float]]:
    """Way of learning -> accuracy on the omitted digit, and on all digits."""
    torch.manual_seed(seed)
    images, labels = digits()
    learn, told, fresh, truth = images[TEST:], labels[TEST:], images[:TEST], labels[:TEST]
    teacher = network(256)
    train(teacher, learn, torch.zeros(len(learn), 10), told, 0.0)
    seen = told != OMITTED
    transfer, left = learn[seen], told[seen]
    with torch.no_grad():
        soft, found = teacher(transfer), {"teacher, all digits": teacher(fresh)}
    start = network(32)
    for name, alpha in (("student, labels", 0.0), ("student, soft answers", 1.0)):
        student = network(32)
        student.load_state_dict(start.state_dict())
        train(student, transfer, soft, left, alpha)
        with torch.no_grad():
            found[name] = student(fresh)
    share = (told == OMITTED).double().mean().item()
    for name in ("student, labels", "student, soft answers"):
        logits = found[name].clone()
        logits[:, OMITTED] += bias_for(logits, share)
        found[f"{name}, bias raised"] = logits
    return {name: _accuracy(logits, truth) for name, logits in found.items()}


def _accuracy(logits: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    right = (logits.argmax(1) == truth).double()
    return right[truth == OMITTED].mean().item(), right.mean().item()


def main() -> None:
    """Print the table."""
    print(f"{'learned from':36} {f'accuracy on {OMITTED}':>14} {'on all':>8}   ({TEST} images)")
    for name, (omitted, overall) in measure().items():
        print(f"{name:36} {omitted:14.3f} {overall:8.3f}")


if __name__ == "__main__":
    main()
