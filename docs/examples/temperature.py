"""What a temperature does to a teacher's answer: the table of dog, wolf and cat.

    python docs/examples/temperature.py

At T = 1 the teacher is sure of "dog", and a student that learns from it sees little else. At T = 10 it sees as well
that a wolf is nearer to a dog than a cat is: what Hinton et al. (2015, arXiv:1503.02531) call dark knowledge.
"""

import torch

CLASSES = ("dog", "wolf", "cat")
LOGITS = torch.tensor([5.0, 3.0, 1.5])


def softened(temperature: float) -> list[float]:
    """Probabilities of the classes at a temperature."""
    return torch.softmax(LOGITS / temperature, dim=0).tolist()


def main() -> None:
    """Print the table."""
    print(f"{'T':>4} " + " ".join(f"{name:>6}" for name in CLASSES))
    for temperature in (1.0, 2.0, 5.0, 10.0):
        print(f"{temperature:4g} " + " ".join(f"{value:6.3f}" for value in softened(temperature)))


if __name__ == "__main__":
    main()
