"""Under ZeRO-3 a weight is there only while its module computes; what the layer keeps for backward must not hold it.

The Triton path is asked the same in ``interpreted/cases_layer.py``.
"""

import json
import sys

import pytest
from children import run_python


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
def test_no_weight_is_pinned_between_forward_and_backward_while_a_loop_over_experts_pins_all() -> None:
    printed = run_python("pinned_weights.py", MALLOC_MMAP_THRESHOLD_="65536").splitlines()
    found = {line.pop("layer"): line for line in map(json.loads, printed)}
    assert found.keys() == {"sorted", "dense", "loop"}
    assert all(line["same_gradients"] for line in found.values())
    for path in ("sorted", "dense"):
        assert found[path]["freed"]
        assert found[path]["kept_mib"] < 10, "96 MiB of weights should be gone"
    assert not found["loop"]["freed"]
    assert found["loop"]["kept_mib"] > 90


@pytest.mark.e2e
def test_training_under_deepspeed_zero3_gives_the_losses_of_plain_torch_and_frees_the_weights() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    printed = run_python(*launcher, "train_under_zero3.py", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1").splitlines()
    found = json.loads(next(line for line in printed if line.startswith('{"plain"')))
    assert found["zero3"] == pytest.approx(found["plain"], rel=1e-5)
    assert [len(freed) for freed in found["freed"]] == [4 * 2 * 2] * 2
    assert all(map(all, found["freed"]))
