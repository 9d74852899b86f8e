# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from madtp.training.losses import JointLoss, align_loss, kd_loss, summary_loss


def test_align_loss():
    torch.manual_seed(0)
    vision, text = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    cos = (vision * text).sum(-1) / (vision.norm(dim=-1) * text.norm(dim=-1))
    torch.testing.assert_close(align_loss(vision, text), (1 - cos).mean())
    assert align_loss(vision, 3 * vision).abs() < 1e-6
    assert align_loss(vision, -vision) == pytest.approx(2)


def test_summary_loss_is_the_mean_over_layers():
    student = [torch.ones(2, 4, requires_grad=True), torch.zeros(2, 4)]
    teacher = [torch.zeros(2, 4, requires_grad=True), torch.full((2, 4), 3.0)]
    loss = summary_loss(student, teacher)
    assert loss.item() == (1 + 9) / 2
    loss.backward()
    assert student[0].grad is not None and teacher[0].grad is None


def test_kd_loss_direction_temperature_and_mask():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5, requires_grad=True)
    teacher = torch.randn(2, 3, 5, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    rows = (p * (p.log() - q.log())).sum(-1)  # KL(teacher || student)
    torch.testing.assert_close(kd_loss(student, teacher, 2.0), 4 * rows.mean())
    torch.testing.assert_close(kd_loss(student, teacher, 2.0, mask), 4 * rows[mask].mean())
    assert kd_loss(student, student, 3.0).abs() < 1e-6

    with torch.no_grad():
        teacher[~mask] = torch.nan  # padding may hold anything
    kd_loss(student, teacher, 2.0, mask).backward()
    assert teacher.grad is None and student.grad.isfinite().all() and not student.grad[~mask].any()
    assert kd_loss(student, teacher, 2.0, torch.zeros_like(mask)) == 0


def test_kd_loss_takes_classes_the_teacher_rules_out():
    teacher = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert kd_loss(torch.zeros(1, 3), teacher, 1.0).isfinite()


def test_joint_loss_weights_and_parts():
    torch.manual_seed(0)
    aligned = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    vision, text = ([torch.randn(2, 4)], [torch.randn(2, 4)]), ([torch.randn(2, 4)], [torch.randn(2, 4)])
    logits = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6)
    task = torch.tensor(0.7, requires_grad=True)
    joint = JointLoss(kd_temperature=2.0)
    loss, parts = joint(task, aligned=aligned, summary_features={"vision": vision, "text": text}, logits=logits)
    assert list(parts) == ["task", "align", "vision", "text", "kd"] and not any(p.requires_grad for p in parts.values())
    expected = 0.7 + 0.1 * align_loss(*aligned) + summary_loss(*vision) + 10 * summary_loss(*text)
    torch.testing.assert_close(loss, expected + kd_loss(*logits, 2.0))
    loss.backward()
    assert task.grad == 1

    loss, parts = joint(task)
    assert loss == task and list(parts) == ["task"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: align_loss(torch.ones(1, 2, 3), torch.ones(1, 2, 4)), "aligned_text must have the shape of"),
        (lambda: summary_loss([torch.ones(1, 2)], []), "the same layers, got 1 and 0"),
        (lambda: summary_loss([], []), "the same layers"),
        (lambda: summary_loss([torch.ones(1, 2)], [torch.ones(2, 2)]), r"teacher\[0\] must have the shape of student"),
        (lambda: kd_loss(torch.ones(2, 3), torch.ones(2, 4), 1.0), "teacher_logits must have the shape"),
        (lambda: kd_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, torch.ones(2)), r"mask must be bool of shape \(2,\)"),
        (lambda: JointLoss()(torch.ones(()), summary_features={"audio": ([], [])}), 'must be of "vision" and "text"'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
