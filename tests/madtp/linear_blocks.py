# SPDX-License-Identifier: Apache-2.0
"""The two Linears of an MLP, which pack with what is between and after them; and a way through `torch.save`."""

import io

import torch
from torch import nn

from madtp import hwp


class Block(nn.Module):
    """x + fc2(relu(fc1(x))), the same weights each time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)

    def forward(self, x):
        return hwp.residual_linear(self.fc2, self.act(self.fc1(x)), x)


def saved_and_loaded(value, weights_only=False):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)
