from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from granvit.train.distill import (
    MEMORY,
    Statistics,
    Teacher,
    distillation_loss,
    feature_moments,
    feature_statistics,
)

TARGETS = ("standardized", "layer_norm", "cosine", "mse")


class Student(nn.Linear):
    config = SimpleNamespace(hidden_size=3)


def test_teacher_is_the_exact_moving_average():
    torch.manual_seed(0)
    student = Student(5, 3)
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
    student = Student(5, 3).train()
    teacher = Teacher(student, alpha=0.5)
    assert not teacher.encoder.training and student.training
    assert not any(p.requires_grad for p in teacher.encoder.parameters())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_teacher_refuses_a_momentum_out_of_range(alpha):
    with pytest.raises(ValueError, match="distill.alpha"):
        Teacher(Student(1, 1), alpha)


@pytest.mark.parametrize("target", TARGETS)
def test_loss_is_zero_for_equal_features_and_positive_else(target):
    torch.manual_seed(0)
    a, b = torch.randn(40, 8), torch.randn(40, 8)
    assert distillation_loss(a, a, target).mean().item() == pytest.approx(0, abs=1e-3)
    assert distillation_loss(a, b, target).shape == (40,) and distillation_loss(a, b, target).mean() > 0.1


def test_only_mse_is_lowered_by_shrinking_the_features():
    torch.manual_seed(0)
    a, b = torch.randn(200, 8), torch.randn(200, 8)
    for target in TARGETS:
        whole, shrunk = (distillation_loss(k * a, k * b, target).mean().item() for k in (1, 0.1))
        if target == "mse":
            assert shrunk < 0.02 * whole
        else:
            assert shrunk == pytest.approx(whole, rel=0.05)


def test_standardized_has_the_gradient_of_the_distance_that_standardizes_by_its_own_statistics():
    """So that shrinking, or moving, the student is worth nothing: the gradient is at right angles to both."""
    torch.manual_seed(0)
    teacher = torch.randn(300, 6) * torch.arange(1.0, 7) + 5
    student = (0.3 * teacher + 2 * torch.randn(300, 6)).requires_grad_()
    loss = distillation_loss(student, teacher, "standardized").mean()
    (ours,) = torch.autograd.grad(loss, student)
    x, y = ((f - f.mean(0)) / f.std(0, unbiased=False) for f in (student, teacher))
    distance = (x - y).square().mean()
    (exact,) = torch.autograd.grad(distance, student)
    torch.testing.assert_close(loss, distance, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
    along = F.cosine_similarity(ours, student - student.mean(0), dim=0)
    assert along.abs().max() < 1e-3 and ours.sum(0).abs().max() < 1e-3 * ours.abs().sum()


def test_statistics_are_weighted_means_over_steps_however_these_are_cut():
    """Against NumPy's covariance of all positions, each weighted by MEMORY to the power of its step's age."""
    torch.manual_seed(0)
    steps = [torch.randn(2, n, 4) * (k + 1) + torch.tensor([[[3.0]], [[-50.0]]]) * k for k, n in enumerate((90, 7, 40))]
    whole, cut = Statistics(4), Statistics(4)
    for student, teacher in steps:
        whole.update(whole.moments(student, teacher))
        cut.update(sum(cut.moments(*part) for part in zip(student.split(13), teacher.split(13), strict=True)))
    for name, value in vars(whole).items():
        torch.testing.assert_close(vars(cut)[name], value, rtol=1e-5, atol=1e-5)
    weights = np.concatenate([np.full(step.shape[1], MEMORY ** (2 - age)) for age, step in enumerate(steps)])
    both = torch.cat(steps, dim=1).double().numpy()
    for c in range(4):
        expected = np.cov(both[:, :, c], aweights=weights, ddof=0)
        entries = [expected[i] for i in ((0, 0), (1, 1), (0, 1))]
        assert whole.covariance[:, c].tolist() == pytest.approx(entries, rel=1e-4)
        assert whole.mean[:, c].tolist() == pytest.approx(np.average(both[:, :, c], 1, weights).tolist(), rel=1e-4)


@pytest.mark.parametrize("target", ["standardized", "mse"])
def test_a_student_that_can_not_see_all_shrinks_by_mse_alone(target):
    """It sees the teacher's input under as much noise. (x - y)^2 by running statistics shrinks it too: they follow it
    down, and the test then fails."""
    torch.manual_seed(0)
    student = Student(8, 3)
    teacher = Teacher(student, alpha=0.9)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    spread = []
    for _ in range(400):
        seen = torch.randn(64, 8)
        features, wanted = student(seen + torch.randn(64, 8)), teacher.encoder(seen)
        loss = distillation_loss(features, wanted, target, teacher.statistics).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        teacher.statistics.update(teacher.statistics.moments(features, wanted))
        spread.append(features.detach().std(0).mean())
    kept = torch.stack(spread[-20:]).mean() / torch.stack(spread[:20]).mean()
    assert kept > 0.8 if target == "standardized" else kept < 0.5


def test_before_any_step_nothing_is_standardized():
    student = torch.randn(10, 4, requires_grad=True)
    loss = distillation_loss(student, torch.randn(10, 4), "standardized", Statistics(4)).sum()
    loss.backward()
    assert loss == 0 and student.grad.abs().max() == 0


def test_standardized_has_finite_gradients_for_constant_features():
    a = torch.ones(10, 4, requires_grad=True)
    distillation_loss(a, torch.randn(10, 4), "standardized").mean().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("mean", [50.0, 1e4])
def test_statistics_of_nearly_constant_channels_far_from_zero_stay_sound(mean):
    """Their variance is less than what rounding leaves of the mean's square; a NaN would skip all further steps."""
    torch.manual_seed(0)
    statistics = Statistics(64)
    for _ in range(3):
        student, teacher = (mean + torch.randn(64) + 1e-3 * torch.randn(40, 64) for _ in range(2))
        statistics.update(statistics.moments(student, teacher))
        assert (statistics.covariance[:2] >= 0).all()
        assert distillation_loss(student, teacher, "standardized", statistics).abs().max() < 10


def test_loss_names_the_targets_it_takes():
    with pytest.raises(ValueError, match="standardized, layer_norm, cosine or mse"):
        distillation_loss(torch.ones(2, 2), torch.ones(2, 2), "whitened")


def test_effective_rank_of_known_spectra():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(1000, 6))[0]
    directions = torch.linalg.qr(directions - directions.mean(0))[0]
    for rank in (1, 3, 6):
        features = 50 + directions[:, :rank] @ torch.linalg.qr(torch.randn(rank, rank))[0]
        measured = feature_statistics(sum(map(feature_moments, features.split([0, 1, 599, 400]))))
        assert measured["effective_rank"] == pytest.approx(rank, rel=1e-3)
        assert measured["std"] == pytest.approx(features.double().std(0, unbiased=False).mean().item(), rel=1e-6)
