import pytest
import torch
from torch import nn

from granvit.train.distill import Teacher, distillation_loss, feature_statistics

TARGETS = ("standardized", "layer_norm", "cosine", "mse")


def test_teacher_is_the_exact_moving_average():
    torch.manual_seed(0)
    student = nn.Linear(5, 3)
    teacher = Teacher(student, alpha=0.9)
    expected = [p.detach().double().clone() for p in student.parameters()]
    for _ in range(20):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        teacher.update(student)
        expected = [0.9 * e + 0.1 * p.detach().double() for e, p in zip(expected, student.parameters(), strict=True)]
    for e, p in zip(expected, teacher.encoder.parameters(), strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-6, atol=1e-6)


def test_teacher_has_no_gradient_and_stays_in_eval_mode():
    student = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    teacher = Teacher(student, alpha=0.5)
    assert not teacher.encoder.training and student.training
    assert not any(p.requires_grad for p in teacher.encoder.parameters())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_teacher_refuses_a_momentum_out_of_range(alpha):
    with pytest.raises(ValueError, match="distill.alpha"):
        Teacher(nn.Linear(1, 1), alpha)


@pytest.mark.parametrize("target", TARGETS)
def test_loss_is_zero_for_equal_features_and_positive_else(target):
    torch.manual_seed(0)
    a, b = torch.randn(40, 8), torch.randn(40, 8)
    assert distillation_loss(a, a, target).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(a, b, target).item() > 0.1


def test_only_mse_is_lowered_by_shrinking_the_features():
    torch.manual_seed(0)
    a, b = torch.randn(200, 8), torch.randn(200, 8)
    for target in TARGETS:
        whole, shrunk = distillation_loss(a, b, target), distillation_loss(0.1 * a, 0.1 * b, target)
        if target == "mse":
            assert shrunk < 0.02 * whole
        else:
            assert shrunk == pytest.approx(whole.item(), rel=0.05)


def test_standardized_has_finite_gradients_for_constant_features():
    a = torch.ones(10, 4, requires_grad=True)
    distillation_loss(a, torch.randn(10, 4), "standardized").backward()
    assert a.grad.isfinite().all()


def test_loss_names_the_targets_it_takes():
    with pytest.raises(ValueError, match="standardized, layer_norm, cosine or mse"):
        distillation_loss(torch.ones(2, 2), torch.ones(2, 2), "whitened")


def test_effective_rank_of_known_spectra():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(1000, 6))[0]
    directions = torch.linalg.qr(directions - directions.mean(0))[0]
    for rank in (1, 3, 6):
        measured = feature_statistics(directions[:, :rank] @ torch.linalg.qr(torch.randn(rank, rank))[0])
        assert measured["effective_rank"] == pytest.approx(rank, rel=1e-3)
    assert feature_statistics(torch.randn(5000, 4) * 2)["std"] == pytest.approx(2, rel=0.05)
