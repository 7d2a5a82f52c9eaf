"""The critic: how much reward is still to come, read from a state before each token.

Shapes as in `models.packing`: B rows, K kept columns, H hidden size, N replies, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.loading import load_backbone, text_config
from models.masks import attention_mask
from models.packing import PackedBatch


class Critic(nn.Module):
    """A linear head, zero at the start, on the last state of the policy or of an own backbone.

    Args:
        policy: the causal language model that is trained.
        folder: a backbone of its own, which reads the policy's tokens; None: the policy's.
    """

    def __init__(self, policy: Any, folder: Path | None) -> None:
        super().__init__()
        self.backbone = None if folder is None else load_backbone(folder, "float32")
        self._state_BLH: Tensor | None = None
        if self.backbone is None:
            # Kept out of the module tree: the policy is no part of the critic.
            decoder = getattr(policy, policy.base_model_prefix)
            decoder.register_forward_hook(self._keep)
        source: Any = policy if self.backbone is None else self.backbone
        self.head = nn.Linear(text_config(source.config).hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._state_BLH = output.last_hidden_state

    def forward(self, batch: PackedBatch) -> Tensor:
        """Estimates before each reply token, float32, shape (N, T); the policy has just read the
        same batch."""
        if self.backbone is None:
            state_BLH, self._state_BLH = self._state_BLH, None
        else:
            state_BLH = self.backbone(
                input_ids=batch.input_ids_BL,
                attention_mask=attention_mask(self.backbone, batch),
                position_ids=batch.position_ids_BL,
                use_cache=False,
            ).last_hidden_state
        assert state_BLH is not None
        state_RH = state_BLH[:, -batch.kept_columns :].flatten(0, 1)
        values_R: Tensor = self.head(state_RH.to(self.head.weight.dtype)).squeeze(-1)
        return values_R[batch.predictors_NT].to(torch.float32)
