# SPDX-License-Identifier: Apache-2.0
"""The losses of joint training: alignment of the branches, and distillation from the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp_kernels.renamed import renamed


def align_loss(aligned_vision: Tensor, aligned_text: Tensor) -> Tensor:
    """Mean over (B, K) of 1 - cos of the aligned features, each (B, K, d) (MADTP, arXiv 2403.02991, MAG)."""
    _same_shape("aligned_vision", aligned_vision, "aligned_text", aligned_text)
    return 1 - F.cosine_similarity(aligned_vision.float(), aligned_text.float(), dim=-1).mean()


def summary_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the MSE between summary tokens, one (B, C) per layer. The teacher gets no gradient."""
    if len(student) != len(teacher) or not student:
        raise ValueError(f"student and teacher must have the same layers, got {len(student)} and {len(teacher)}")
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
        _same_shape(f"student[{layer}]", s, f"teacher[{layer}]", t)
    return torch.stack(
        [F.mse_loss(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True)]
    ).mean()


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """T^2 times the mean over rows of KL(p_teacher || p_student), p = softmax(logits / T) (Hinton et al. 2015).

    The expectation runs over the teacher's distribution, as in `F.kl_div(log p_student, p_teacher)`; T^2 keeps the size
    of the gradient the same at every temperature. The teacher gets no gradient.

    Args:
        student_logits, teacher_logits: (..., classes).
        temperature: T > 0.
        mask: (...) bool, the rows that count (padding positions do not); None is all. No row gives 0.
    """
    _same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != student_logits.shape[:-1]:
            shape = tuple(student_logits.shape[:-1])
            raise ValueError(f"mask must be bool of shape {shape}, got {mask.dtype} {tuple(mask.shape)}")
        student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.softmax(teacher_logits.detach().float() / temperature, dim=-1)
    rows = max(student[..., 0].numel(), 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum") / rows


@dataclass(frozen=True)
class JointLoss:
    """L = L_task + align * L_align + vision * L_vis + text * L_txt + kd * T^2 KL; a part not given is left out."""

    align_weight: float = 0.1
    vision_weight: float = 1.0
    text_weight: float = 10.0
    kd_weight: float = 1.0
    kd_temperature: float = 4.0

    @renamed(summaries="summary_features")
    def __call__(
        self,
        task: Tensor,
        *,
        aligned: tuple[Tensor, Tensor] | None = None,
        summary_features: Mapping[str, tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None,
        logits: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            task: scalar loss of the task.
            aligned: (vision, text), for `align_loss`.
            summary_features: {"vision": (student, teacher), "text": (student, teacher)}, for `summary_loss`.
            logits, mask: (student, teacher) and the rows that count, for `kd_loss`.

        Returns:
            the loss, and its parts before weighting, detached: "task", and "align", "vision", "text", "kd" as given.
        """
        features = summary_features or {}
        unknown = set(features) - {"vision", "text"}
        if unknown:
            raise ValueError(f'summary_features must be of "vision" and "text", got {sorted(unknown)}')
        parts = {"task": (1.0, task)}
        if aligned is not None:
            parts["align"] = (self.align_weight, align_loss(*aligned))
        if "vision" in features:
            parts["vision"] = (self.vision_weight, summary_loss(*features["vision"]))
        if "text" in features:
            parts["text"] = (self.text_weight, summary_loss(*features["text"]))
        if logits is not None:
            parts["kd"] = (self.kd_weight, kd_loss(*logits, self.kd_temperature, mask))
        first, *others = (weight * part for weight, part in parts.values())
        return sum(others, start=first), {name: part.detach() for name, (_, part) in parts.items()}


def _same_shape(left_name: str, left: Tensor, right_name: str, right: Tensor) -> None:
    if left.shape != right.shape:
        raise ValueError(
            f"{right_name} must have the shape of {left_name}, got {tuple(right.shape)} and {tuple(left.shape)}"
        )
