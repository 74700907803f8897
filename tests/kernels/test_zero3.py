"""Under ZeRO-3 a weight exists only while its module computes; the tensors saved for backward must not hold it.

``layer_properties.py`` tests the same in one process, on every path.
"""

import json

import pytest
from children import run_python


@pytest.mark.e2e
def test_training_under_deepspeed_zero3_gives_the_losses_of_plain_torch_and_frees_the_weights() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    printed = run_python(*launcher, "train_under_zero3.py", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1").splitlines()
    result = json.loads(next(line for line in printed if line.startswith('{"plain"')))
    assert result["zero3"] == pytest.approx(result["plain"], rel=1e-5)
    assert [len(freed) for freed in result["freed"]] == [4 * 2 * 2] * 2
    assert all(map(all, result["freed"]))
