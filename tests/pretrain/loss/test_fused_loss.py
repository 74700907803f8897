import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.pretrain.loss import fused_loss

ROOT = Path(__file__).resolve().parents[3]


def test_liger_is_not_asked_without_cuda() -> None:
    assert not fused_loss.available(torch.device("cpu"))


def test_a_head_with_a_bias_is_refused() -> None:
    pytest.importorskip("liger_kernel")

    class Model(nn.Module):
        def get_output_embeddings(self) -> nn.Module:
            return nn.Linear(4, 8)

    with pytest.raises(ValueError, match="its output head has a bias"):
        fused_loss.in_place_of_logits(Model(), torch.zeros(1, 2), ignored=-100).__enter__()


def test_liger_gives_the_stock_losses_and_gradients() -> None:
    """In a process of its own: TRITON_INTERPRET changes what Triton means for all of one."""
    pytest.importorskip("liger_kernel")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/pretrain/loss/interpreted_loss_cases.py",
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
