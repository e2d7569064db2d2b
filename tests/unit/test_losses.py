"""The loss of soft and hard targets: its formula, its limits, its gradients."""

import math

import pytest
import torch

from pipeline.student.losses import distillation_loss

LABELS = torch.tensor([[2, -100, 0], [1, 3, -100]])


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(student: torch.Tensor, teacher: torch.Tensor, temperature: float, alpha: float) -> float:
    """Position by position, with plain numbers."""

    def probabilities(row: torch.Tensor, at: float) -> list[float]:
        powers = [math.exp(value / at) for value in row.tolist()]
        return [power / sum(powers) for power in powers]

    losses = []
    for row, column in [(0, 0), (0, 2), (1, 0), (1, 1)]:
        p, q = (probabilities(each[row, column], temperature) for each in (teacher, student))
        soft = sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))
        hard = -math.log(probabilities(student[row, column], 1.0)[int(LABELS[row, column])])
        losses.append(alpha * temperature**2 * soft + (1 - alpha) * hard)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_it_is_the_formula(temperature: float, alpha: float) -> None:
    student, teacher = logits(1), logits(2)
    loss = distillation_loss(student, teacher, LABELS, temperature=temperature, alpha=alpha)
    assert loss.item() == pytest.approx(by_hand(student, teacher, temperature, alpha), rel=1e-12)


def test_where_both_agree_only_the_hard_term_is_left() -> None:
    same = logits(1)
    whole = distillation_loss(same, same, LABELS, temperature=3.0, alpha=0.25)
    hard = torch.nn.functional.cross_entropy(same.reshape(-1, 5), LABELS.reshape(-1))
    assert whole.item() == pytest.approx(0.75 * hard.item())


def test_positions_that_do_not_count_change_nothing() -> None:
    student, teacher = logits(1), logits(2)
    before = distillation_loss(student, teacher, LABELS, temperature=2.0, alpha=0.5)
    student[LABELS == -100] = 1e4
    teacher[LABELS == -100] = float("nan")
    assert distillation_loss(student, teacher, LABELS, temperature=2.0, alpha=0.5).item() == before.item()


def test_the_gradient_of_the_soft_term_is_as_large_at_any_high_temperature() -> None:
    """Hinton et al., equation 4: in the limit it does not depend on T, thanks to T²."""
    sizes = []
    for temperature in (50.0, 500.0):
        student = logits(1).requires_grad_()
        distillation_loss(student, logits(2), LABELS, temperature=temperature, alpha=1.0).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = logits(1).requires_grad_(), logits(2).requires_grad_()
    distillation_loss(student, teacher, LABELS, temperature=2.0, alpha=0.5).backward()
    assert student.grad is not None and teacher.grad is None


def test_without_a_position_that_counts_it_is_0_and_can_be_differentiated() -> None:
    student = logits(1).requires_grad_()
    loss = distillation_loss(student, logits(2), torch.full_like(LABELS, -100), temperature=2.0, alpha=0.5)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and student.grad.abs().sum().item() == 0.0


def test_half_precision_is_computed_in_single() -> None:
    student, teacher = logits(1, torch.bfloat16), logits(2, torch.bfloat16)
    loss = distillation_loss(student, teacher, LABELS, temperature=2.0, alpha=0.5)
    assert loss.dtype is torch.float32
    exact = distillation_loss(student.double(), teacher.double(), LABELS, temperature=2.0, alpha=0.5)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_what_the_teacher_rules_out_weighs_nothing() -> None:
    student, teacher = logits(1).requires_grad_(), logits(2)
    teacher[..., 4] = -math.inf
    loss = distillation_loss(student, teacher, LABELS, temperature=2.0, alpha=1.0)
    loss.backward()
    teacher[..., 4] = -1e4
    close = distillation_loss(student, teacher, LABELS, temperature=2.0, alpha=1.0)
    assert loss.item() == pytest.approx(close.item())
    assert student.grad is not None and bool(student.grad.isfinite().all())


def test_one_position_needs_no_batch() -> None:
    loss = distillation_loss(torch.zeros(4), torch.zeros(4), torch.tensor(1), temperature=1.0, alpha=0.0)
    assert loss.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(logits(1), logits(2), LABELS, temperature=temperature, alpha=0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_weight_that_is_none(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        distillation_loss(logits(1), logits(2), LABELS, temperature=1.0, alpha=alpha)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 5\), \(2, 3, 4\), \(2, 3\)"):
        distillation_loss(logits(1), logits(2)[..., :4], LABELS, temperature=1.0, alpha=0.5)
    with pytest.raises(ValueError, match=r"labels"):
        distillation_loss(logits(1), logits(2), LABELS[:, :2], temperature=1.0, alpha=0.5)


@pytest.mark.parametrize("label", [5, -1])
def test_labels_of_another_vocabulary(label: int) -> None:
    with pytest.raises(IndexError, match="labels are from 0 to 4, or -100"):
        distillation_loss(logits(1), logits(2), torch.full_like(LABELS, label), temperature=1.0, alpha=0.5)
