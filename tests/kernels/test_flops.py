import moe_kernels.flops  # noqa: F401
import pytest
import torch
from moe_kernels import experts_layer, experts_sorted
from problems import make_problem
from torch.utils.flop_counter import FlopCounterMode

TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 20, 6, 2, 16, 8
PRODUCT = 2 * TOKENS * TOP_K * HIDDEN * WIDTH


def leaves(*wanted: str) -> tuple[torch.Tensor, ...]:
    p = make_problem(TOKENS, EXPERTS, top_k=TOP_K, hidden=HIDDEN, width=WIDTH)
    names = ("x_TD", "w13_EGD", "w2_EDF", "top_k_index_TK", "top_k_weights_TK")
    return tuple(getattr(p, name).requires_grad_(name in wanted) for name in names)


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        (("x_TD", "w13_EGD", "w2_EDF", "top_k_weights_TK"), 9),
        (("x_TD",), 6),
        (("w13_EGD",), 6),
        (("w2_EDF",), 4),
        (("top_k_weights_TK",), 4),
    ],
)
def test_torch_counts_the_products_that_each_gradient_needs(wanted: tuple[str, ...], products: int) -> None:
    with FlopCounterMode(display=False) as counter:
        experts_layer(*leaves(*wanted), path="sorted").sum().backward()
    assert counter.get_total_flops() == products * PRODUCT


def test_the_dense_path_is_counted_as_what_it_computes() -> None:
    with FlopCounterMode(display=False) as counter:
        experts_layer(*leaves("x_TD", "w13_EGD", "w2_EDF"), path="dense").sum().backward()
    assert counter.get_total_flops() == 9 * PRODUCT * EXPERTS // TOP_K


def test_inference_and_sorted_rows_are_counted() -> None:
    x, w13, w2, index, _ = leaves()
    with FlopCounterMode(display=False) as counter:
        experts_sorted(x, w13, w2, index[:, 0].bincount(minlength=EXPERTS))
    assert counter.get_total_flops() == 3 * PRODUCT // TOP_K
