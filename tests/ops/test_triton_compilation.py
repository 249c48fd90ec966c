"""What the compiler makes of the Triton kernels, without a GPU: of some of them, or of all under
S2S_HYPOTHESIS=thorough."""

import os
from pathlib import Path

import pytest

from s2s_kernels import dispatch
from s2s_kernels.testing.compilation import LIGHT, compile_for, on_tensor_cores, within_limits

# Of each operator: the kernels of products, others that are compiled for every architecture, and the rest.
KERNELS = {
    "attention": (
        {"forward_kernel", "query_kernel", "key_value_kernel", "bias_kernel"},
        set(),
        {"combine_kernel"},
    ),
    "additive_attention": (
        {
            "context_kernel", "product_kernel", "value_gradient_kernel", "pool_scores_kernel",
            "pool_map_gradient_kernel", "pool_input_gradient_kernel",
        },
        {"scores_kernel", "gradient_kernel"},
        {
            "statistics_kernel", "score_gradient_kernel", "pool_softmax_kernel", "pool_sum_kernel",
            "pool_weight_gradient_kernel", "pool_score_gradient_kernel", "reduce_kernel",
        },
    ),
    "convolution": (
        {"dense_kernel", "dense_weight_kernel", "toeplitz_kernel", "toeplitz_weight_kernel"},
        {"depthwise_kernel", "depthwise_weight_kernel", "line_kernel", "line_weight_kernel", "step_kernel"},
        {
            "bias_kernel", "reduce_kernel", "finish_kernel", "activation_gradient_kernel", "push_kernel",
            "advance_kernel",
        },
    ),
    "recurrence": (
        {"forward_kernel", "backward_kernel"},
        {"cell_kernel", "cell_gradient_kernel"},
        {
            "begin_kernel", "project_kernel", "project_gradient_kernel", "finish_kernel", "recurrent_input_kernel",
            "unprojected_kernel", "drop_kernel",
        },
    ),
}  # fmt: skip
THOROUGH = os.environ.get("S2S_HYPOTHESIS") == "thorough"


def small(operator, kernel):
    """Whether a tile is too small for the units of whole warp groups: one of decoding, of very wide heads, of few rows
    or keys, or of the rows of a recurrence."""
    if operator == "recurrence":
        return True
    if operator == "attention":
        return kernel["ROWS"] < 64 or kernel["dtype"] == "float32"
    few = min(kernel.get("ROWS", 64), kernel.get("KEYS", 64)) < 64
    return kernel["dtype"] == "float32" or (few and kernel["name"] not in ("dense_kernel", "dense_weight_kernel"))


def spills(operator, kernel, arch):
    """Whether a kernel may, since it was measured to be the faster for it."""
    if operator != "attention" or arch != 90 or kernel["dtype"] == "float32":
        return False
    from s2s_kernels.ops.attention.triton_tiles import SPILLING

    names = {"forward_kernel": "forward", "query_kernel": "query", "key_value_kernel": "key", "bias_kernel": "bias"}
    direction = names.get(kernel["name"])
    return direction is not None and (direction, kernel["MASK"] + kernel["BIAS"] > 0, kernel["WIDTH"]) in SPILLING


@pytest.mark.skipif(dispatch.triton_missing is not None, reason=str(dispatch.triton_missing))
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_within_the_limits_and_onto_tensor_cores(arch):
    if arch == 100 and dispatch.triton_version() < dispatch.TRITON_FOR_10:
        pytest.skip("triton 3.8, the first to compile all kernels for compute capability 10, is not installed")
    files = {operator: Path(__file__).parent / f"compiled_{operator}.py" for operator in KERNELS}
    compiled = compile_for(list(files.values()), arch, not THOROUGH)
    for operator, (products, heavy, light) in KERNELS.items():
        kernels = [kernel for kernel in compiled if kernel["file"] == files[operator].stem]
        names = {kernel["name"] for kernel in kernels}
        known = products | heavy | (light if arch == LIGHT else set())
        assert names == known if THOROUGH else products & names and names <= known
        for kernel in kernels:
            assert within_limits({**kernel, "stack": 0} if spills(operator, kernel, arch) else kernel, arch), kernel
            exact = kernel["dtype"] == "float32" and kernel["precision"] == "highest"
            if kernel["name"] in products and not exact:
                assert on_tensor_cores(kernel, None if small(operator, kernel) else arch), kernel
