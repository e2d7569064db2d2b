"""Losses of distillation as plain functions of tensors, each with its formula and where it comes from."""

import torch
from torch.nn import functional as F

IGNORED = -100
"""Label of positions that do not count (prompts, padding), as in `torch.nn.functional.cross_entropy`."""


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Soft and hard targets together (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2).

    With p = softmax(teacher / T), q = softmax(student / T) and q₁ = softmax(student), for each position

        loss = alpha · T² · KL(p ‖ q) + (1 − alpha) · −log q₁[label]

    and the mean over the positions whose label counts. T² keeps the gradients of the soft term as large as those of the
    hard one whatever the temperature. The paper's cross-entropy with p differs from KL by the entropy of p, which no
    gradient sees; KL is 0 where student and teacher agree.

    Args:
        student_logits: (…, V), floating point; at each position those of the token that the label names.
        teacher_logits: (…, V), the same shape and vocabulary, aligned with them. No gradient flows into it.
        labels: (…), integers; -100: the position does not count, in either term.
        temperature: T > 0, of both in the soft term; the hard term is taken at 1.
        alpha: weight of the soft term, 0 to 1.

    Returns:
        A scalar of float32 (float64 for float64 logits); 0, with zero gradients, where no position counts.

    Raises:
        ValueError: shapes do not fit, the temperature is not positive and finite, or alpha is outside 0 to 1.
        IndexError: a label is none of the vocabulary's.

    Not covered: shifting labels by one, and vocabularies that differ: align both before.
    """
    _check(student_logits, teacher_logits, labels, temperature, alpha)
    counted = labels != IGNORED
    student, targets = student_logits[counted], labels[counted]
    teacher = teacher_logits[counted].detach()
    if targets.numel() == 0:
        return student.to(_precise(student)).sum()  # 0, and part of the graph: a batch of prompts alone is no error
    _check_labels(targets, student.shape[-1])
    precise = _precise(student)
    student, teacher = student.to(precise), teacher.to(precise)
    hard = F.cross_entropy(student, targets)
    q = F.log_softmax(student / temperature, dim=-1)
    p = F.log_softmax(teacher / temperature, dim=-1)
    weights = p.exp()
    # What the teacher rules out (a logit of -inf) weighs nothing, though its logarithm is infinite.
    gaps = (p - q).masked_fill(weights == 0, 0.0)
    soft = (weights * gaps).sum(dim=-1).mean()
    return alpha * temperature**2 * soft + (1 - alpha) * hard


def _precise(logits: torch.Tensor) -> torch.dtype:
    """Half precision loses the small probabilities that soft targets are about."""
    return torch.promote_types(logits.dtype, torch.float32)


def _check(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float, alpha: float
) -> None:
    if student.shape != teacher.shape or student.shape[:-1] != labels.shape or student.dim() == 0:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (student, teacher, labels))
        raise ValueError(f"student and teacher logits are (…, V), labels (…), and these are {shapes}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the temperature is above 0 and finite, and this is {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is from 0 to 1, and this is {alpha}")


def _check_labels(targets: torch.Tensor, vocabulary: int) -> None:
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocabulary:
        raise IndexError(f"labels are from 0 to {vocabulary - 1}, or {IGNORED}, and these go from {low} to {high}")
