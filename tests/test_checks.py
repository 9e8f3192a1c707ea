"""Every wrong argument gets an error that names the function, the argument, the rule and what came."""

import re

import array_api_strict
import numpy as np
import pytest

import refimpl

ATTENTION, MULTI_HEAD, WEIGHTS = "scaled_dot_product_attention", "multi_head_attention", "attention_weights"
INDICES = np.arange(30).reshape(5, 6) + np.zeros((2, 4, 5, 6), dtype=int)
X, WEIGHT, BIAS = np.ones((2, 4, 5, 6)), np.ones((6, 2, 3, 3)), np.ones(6)
QUERY, KEY, VALUE = np.ones((2, 4, 3, 8)), np.ones((2, 2, 5, 8)), np.ones((2, 2, 5, 7))
TOKENS, MEMORY = np.ones((2, 3, 8)), np.ones((2, 5, 8))
PARAMS = {
    "in_proj_weight": np.ones((24, 8)),
    "in_proj_bias": np.ones(24),
    "out_proj.weight": np.ones((8, 8)),
    "out_proj.bias": np.ones(8),
}
SEPARATE = {
    "q_proj_weight": np.ones((8, 8)),
    "k_proj_weight": np.ones((8, 8)),
    "v_proj_weight": np.ones((6, 8)),
    "out_proj.weight": np.ones((5, 6)),
}

VALID = {
    "conv": {"x": X, "weight": WEIGHT, "bias": BIAS, "groups": 2},
    "conv_transpose": {"x": np.ones((2, 6, 5, 6)), "weight": WEIGHT, "bias": np.ones(4), "groups": 2},
    "max_pool": {"x": X, "kernel_size": 2},
    "avg_pool": {"x": X, "kernel_size": 2},
    "lp_pool": {"x": X, "norm_type": 2, "kernel_size": 2},
    "adaptive_avg_pool": {"x": X, "output_size": 2},
    "adaptive_max_pool": {"x": X, "output_size": 2},
    "max_unpool": {"x": X, "indices": INDICES, "kernel_size": 2},
    ATTENTION: {"query": QUERY, "key": KEY, "value": VALUE},
    WEIGHTS: {"query": QUERY, "key": KEY},
    MULTI_HEAD: {"query": TOKENS, "key": MEMORY, "value": MEMORY, "params": PARAMS, "num_heads": 2},
    "merge_attention": {"outs": X, "logsumexps": np.ones((2, 4, 5))},
}
POOLS = ("max_pool", "avg_pool", "lp_pool")
ADAPTIVE = ("adaptive_avg_pool", "adaptive_max_pool")

# What is no array, for any argument that must be one: (value, error, rule).
NO_ARRAY = [
    ([[1.0]], TypeError, "be a NumPy array"),
    (3.0, TypeError, "be a NumPy array"),
    ("text", TypeError, "be a NumPy array"),
    (np.float64(3), TypeError, "be a NumPy array"),
    (np.ma.ones((2, 2)), TypeError, "be a NumPy array"),
]
NO_FLOATING = [
    *NO_ARRAY,
    (np.ones((2, 2), dtype=np.complex128), TypeError, "float64, float32, float16 or bfloat16"),
    (np.ones((2, 2), dtype=bool), TypeError, "float64, float32, float16 or bfloat16"),
    (np.ones((2, 2), dtype=object), TypeError, "float64, float32, float16 or bfloat16"),
    (np.ones((2, 2), dtype=">f8"), TypeError, "native byte order"),
    (array_api_strict.ones((2, 2)), TypeError, "same backend"),
]
NO_INT = [
    (1.5, TypeError, "int"),
    (np.timedelta64(3, "s"), TypeError, "int"),
    ("1", TypeError, "int"),
    (True, TypeError, "int"),
    (None, TypeError, "int"),
]
NO_FLAG = [(1, TypeError, "True or False"), (None, TypeError, "True or False"), ("yes", TypeError, "True or False")]
NO_SIZES = [
    *NO_INT,
    (0, ValueError, "at least 1"),
    (-1, ValueError, "at least 1"),
    ((1,), ValueError, "2 spatial dimensions"),
    ((1, 1, 1), ValueError, "2 spatial dimensions"),
    ((1, 0), ValueError, "at least 1"),
    ((1, 1.0), TypeError, "be an int"),
    (np.ones(2, dtype=int), TypeError, "be an int"),
]
NO_PADDING = [
    (-1, ValueError, "at least 0"),
    (0.5, TypeError, "be an int"),
    (None, TypeError, "be an int"),
    ("full", ValueError, "'valid', 'same' or 'same_lower'"),
    ((1,), ValueError, "2 spatial dimensions"),
    ((1, 2, 3), ValueError, "2 spatial dimensions"),
    (((1, 2, 3), 1), ValueError, "pair"),
    (((1, -1), 1), ValueError, "at least 0"),
    (((1, "1"), 1), TypeError, "be an int"),
]

# (op, argument, wrong value, error, rule): the other arguments are those of VALID.
WRONG = [
    *(("conv", name, *case) for name in ("x", "weight", "bias") for case in NO_FLOATING),
    *(("conv", name, None, TypeError, "be an array") for name in ("x", "weight")),
    *(("conv", name, *case) for name in ("stride", "dilation") for case in NO_SIZES),
    *(("conv", "padding", *case) for case in NO_PADDING),
    *(("conv", "groups", *case) for case in NO_INT),
    ("conv", "groups", 0, ValueError, "at least 1"),
    ("conv", "groups", 4, ValueError, r"weight.shape\[1\] \* groups \(2 \* 4 = 8\)"),
    ("conv", "groups", 3, ValueError, r"weight.shape\[1\] \* groups"),
    ("conv", "padding_mode", "mirror", ValueError, "'zeros', 'reflect', 'replicate', 'circular'"),
    ("conv", "padding_mode", None, TypeError, "be a string"),
    ("conv", "x", X.astype(np.float32), TypeError, "same dtype"),
    ("conv", "weight", WEIGHT.astype(np.float32), TypeError, "same dtype as x"),
    ("conv", "bias", BIAS.astype(np.float32), TypeError, "same dtype as x"),
    ("conv", "x", np.ones((4, 5)), ValueError, "4 dimensions, or 3"),
    ("conv", "x", np.ones((1, 2, 4, 5, 6)), ValueError, "4 dimensions, or 3"),
    ("conv", "x", np.ones((2, 5, 5, 6)), ValueError, r"\(2 \* 2 = 4\)"),
    ("conv", "x", np.ones((2, 4, 0, 6)), ValueError, "at least 3 with its padding"),
    ("conv", "x", np.ones((2, 0, 5, 6)), ValueError, "at least 1"),
    ("conv", "x", np.ones((2, 4, 2, 6)), ValueError, "be at least"),
    ("conv", "weight", np.ones((6, 2)), ValueError, "at least 3 dimensions"),
    ("conv", "weight", np.ones((0, 2, 3, 3)), ValueError, "at least 1"),
    ("conv", "weight", np.ones((6, 2, 0, 3)), ValueError, "at least 1"),
    ("conv", "weight", np.ones((5, 2, 3, 3)), ValueError, r"multiple of groups \(2\)"),
    ("conv", "weight", np.ones((6, 2, 6, 3)), ValueError, "be at least"),
    ("conv", "bias", np.ones(5), ValueError, r"shape \(6,\)"),
    ("conv", "bias", np.ones((6, 1)), ValueError, r"shape \(6,\)"),
    ("conv", "dilation", 3, ValueError, "be at least"),
    ("conv", "padding", 2**40, ValueError, "result"),
    *(
        (op, n, 2**41, ValueError, "be at most")
        for op in VALID
        if ("pool" in op or "conv" in op) and op not in ADAPTIVE
        for n in ("stride", "padding")
    ),
    ("max_pool", "kernel_size", 2**100, ValueError, "be at most"),
    *(("conv_transpose", name, *case) for name in ("x", "weight", "bias") for case in NO_FLOATING),
    *(("conv_transpose", name, *case) for name in ("stride", "dilation") for case in NO_SIZES),
    *(("conv_transpose", "padding", *case) for case in NO_PADDING),
    *(("conv_transpose", "output_padding", *case) for case in NO_INT),
    ("conv_transpose", "output_padding", -1, ValueError, "at least 0"),
    ("conv_transpose", "output_padding", 1, ValueError, r"below max\(stride, dilation\) \(1\)"),
    ("conv_transpose", "output_padding", (0, 0, 0), ValueError, "2 spatial dimensions"),
    ("conv_transpose", "output_size", "9", TypeError, "int"),
    ("conv_transpose", "output_size", (7.0, 8), TypeError, "int"),
    ("conv_transpose", "output_size", (7,), ValueError, "2 spatial dimensions"),
    ("conv_transpose", "output_size", (6, 8), ValueError, r"in \[7, 8\)"),
    ("conv_transpose", "output_size", (7, 9), ValueError, r"in \[8, 9\)"),
    ("conv_transpose", "output_size", 0, ValueError, "at least 1"),
    ("conv_transpose", "padding", 4, ValueError, "output size of at least 1"),
    ("conv_transpose", "groups", 4, ValueError, r"multiple of groups \(4\)"),
    ("conv_transpose", "x", np.ones((2, 5, 5, 6)), ValueError, r"weight.shape\[0\] \(6\)"),
    ("conv_transpose", "bias", np.ones(6), ValueError, r"shape \(4,\)"),
    ("conv_transpose", "stride", 2**40, ValueError, "result"),
    *((op, "x", *case) for op in POOLS for case in NO_ARRAY),
    *((op, "x", np.ones((2, 2, 2), dtype=d), TypeError, "float") for op in POOLS for d in (bool, complex)),
    *((op, "x", None, TypeError, "be an array") for op in POOLS),
    *((op, "stride", *case) for op in POOLS for case in NO_SIZES if case[0] is not None),
    *((op, "dilation", *case) for op in POOLS for case in NO_SIZES),
    *((op, "padding", *case) for op in POOLS for case in NO_PADDING),
    *((op, "ceil_mode", *case) for op in POOLS for case in NO_FLAG),
    *((op, "kernel_size", *case) for op in POOLS for case in NO_INT),
    *((op, "kernel_size", 0, ValueError, "at least 1") for op in POOLS),
    *((op, "kernel_size", (), ValueError, "1 to 4 entries") for op in POOLS),
    *((op, "kernel_size", (1,) * 5, ValueError, "1 to 4 entries") for op in POOLS),
    *((op, "kernel_size", 7, ValueError, "be at least") for op in POOLS),
    *((op, "x", np.ones((2, 3)), ValueError, "at least 3 dimensions") for op in POOLS),
    *((op, "x", np.ones((2, 3, 0)), ValueError, "at least 1") for op in POOLS),
    *((op, "padding", 2, ValueError, "every window") for op in POOLS),
    *((op, "padding", ((0, 3), 0), ValueError, "every window") for op in POOLS),
    *(("max_pool", "return_indices", *case) for case in NO_FLAG),
    ("avg_pool", "x", np.ones((2, 4, 5, 6), dtype=int), TypeError, "float64, float32, float16 or bfloat16"),
    *(("avg_pool", "count_include_pad", *case) for case in NO_FLAG),
    *(("avg_pool", "divisor_override", *case) for case in NO_INT if case[0] is not None),
    ("avg_pool", "divisor_override", 0, ValueError, "other than 0"),
    ("avg_pool", "divisor_override", 10**400, ValueError, "be at most"),
    *((ATTENTION, n, *case) for n in ("query", "key", "value", "bias") for case in NO_FLOATING),
    *((ATTENTION, n, None, TypeError, "be an array") for n in ("query", "key", "value")),
    (ATTENTION, "query", np.ones(8), ValueError, "at least 2 dimensions"),
    (ATTENTION, "query", np.ones((2, 3, 3, 8)), ValueError, r"multiple of those of key \(2\)"),
    (ATTENTION, "query", np.ones((3, 4, 3, 8)), ValueError, "broadcast"),
    (ATTENTION, "query", np.ones((2, 0, 3, 8)), ValueError, "at least 1 head"),
    (ATTENTION, "key", np.ones((2, 2, 5, 7)), ValueError, r"query.shape\[-1\] \(8\)"),
    (ATTENTION, "value", np.ones((2, 2, 4, 7)), ValueError, r"key.shape\[-2\] \(5\)"),
    (ATTENTION, "value", np.ones((2, 1, 5, 7)), ValueError, r"as many heads as key \(2\)"),
    (ATTENTION, "bias", np.ones((3, 4)), ValueError, r"scores, \(2, 4, 3, 5\)"),
    (ATTENTION, "bias", np.ones((1, 2, 4, 3, 5)), ValueError, "scores"),
    *((ATTENTION, n, *case) for n in ("mask", "key_lengths", "query_lengths") for case in NO_ARRAY),
    (ATTENTION, "mask", np.ones((3, 5)), TypeError, "dtype bool"),
    (ATTENTION, "mask", np.ones((3, 5), dtype=int), TypeError, "dtype bool"),
    (ATTENTION, "mask", np.ones((3, 4), dtype=bool), ValueError, "scores"),
    (
        ATTENTION,
        "mask",
        array_api_strict.ones((3, 5), dtype=array_api_strict.bool),
        TypeError,
        "backend",
    ),
    *((ATTENTION, n, *case) for n in ("is_causal", "return_logsumexp") for case in NO_FLAG),
    (ATTENTION, "window", 3, TypeError, "pair"),
    (ATTENTION, "window", "ab", TypeError, "pair"),
    (ATTENTION, "window", (1,), ValueError, "pair"),
    (ATTENTION, "window", (1, -2), ValueError, r"left \+ right of at least 0"),
    (ATTENTION, "query_offset", "start", TypeError, "'end'"),
    (ATTENTION, "window", (1.0, 1), TypeError, "be an int"),
    (ATTENTION, "query_offset", 1.0, TypeError, "integer array"),
    (ATTENTION, "query_offset", None, TypeError, "integer array"),
    (ATTENTION, "query_offset", True, TypeError, "integer array"),
    (ATTENTION, "query_offset", np.ones(2), TypeError, "integer dtype"),
    (ATTENTION, "query_offset", np.ones(3, dtype=int), ValueError, r"batch dimensions, \(2,\)"),
    (ATTENTION, "key_lengths", np.ones(2), TypeError, "integer dtype"),
    (ATTENTION, "key_lengths", np.array([5, 6]), ValueError, r"in \[0, 5\]"),
    (ATTENTION, "key_lengths", np.array([-1, 5]), ValueError, r"in \[0, 5\]"),
    (ATTENTION, "key_lengths", np.ones((2, 4), dtype=int), ValueError, "batch dimensions"),
    (ATTENTION, "query_lengths", np.array([4, 0]), ValueError, r"in \[0, 3\]"),
    (ATTENTION, "query_lengths", np.array([True, False]), TypeError, "integer dtype"),
    (ATTENTION, "scale", "1", TypeError, "number"),
    (ATTENTION, "scale", np.nan, ValueError, "finite"),
    (ATTENTION, "scale", np.inf, ValueError, "finite"),
    (ATTENTION, "scale", 10**400, ValueError, "finite"),
    (ATTENTION, "scale", np.ones(()), TypeError, "number"),
    (ATTENTION, "scale", True, TypeError, "number"),
    (ATTENTION, "scale", np.timedelta64(1, "s"), TypeError, "number"),
    (ATTENTION, "query_offset", np.timedelta64(1, "s"), TypeError, "integer array"),
    *((ATTENTION, "dropout_mask", *case) for case in NO_ARRAY),
    (ATTENTION, "dropout_mask", np.ones((3, 5)), TypeError, "dtype bool"),
    (ATTENTION, "dropout_mask", np.ones((3, 4), dtype=bool), ValueError, "weights"),
    (ATTENTION, "dropout_p", 0.5, ValueError, "be 0 without a dropout_mask"),
    *((ATTENTION, "dropout_p", p, ValueError, r"be in \[0, 1\)") for p in (-0.1, 1, 1.5)),
    *((ATTENTION, "dropout_p", p, TypeError, "number") for p in ("0", None, True, np.ones(()))),
    (ATTENTION, "dropout_p", np.nan, ValueError, "finite"),
    *((op, "sink", *case) for op in (ATTENTION, WEIGHTS, MULTI_HEAD) for case in NO_FLOATING),
    *((op, "sink", np.ones(3), ValueError, "one for each head") for op in (ATTENTION, WEIGHTS, MULTI_HEAD)),
    (ATTENTION, "sink", np.ones((4, 1)), ValueError, r"shape \(4,\)"),
    (ATTENTION, "sink", np.ones(4, dtype=np.float32), TypeError, "same dtype"),
    *((op, "softcap", 0, ValueError, "above 0") for op in (ATTENTION, WEIGHTS, MULTI_HEAD)),
    *((op, "softcap", -1.0, ValueError, "above 0") for op in (ATTENTION, WEIGHTS, MULTI_HEAD)),
    *((op, "softcap", "1", TypeError, "number") for op in (ATTENTION, WEIGHTS, MULTI_HEAD)),
    (ATTENTION, "softcap", np.inf, ValueError, "finite"),
    *((WEIGHTS, n, *case) for n in ("query", "key", "bias") for case in NO_FLOATING),
    *((WEIGHTS, n, None, TypeError, "be an array") for n in ("query", "key")),
    (WEIGHTS, "key", np.ones((2, 2, 5, 7)), ValueError, r"query.shape\[-1\] \(8\)"),
    (WEIGHTS, "key", np.ones((2, 3, 5, 8)), ValueError, r"multiple of those of key \(3\)"),
    (WEIGHTS, "key", np.ones((3, 2, 5, 8)), ValueError, "broadcast"),
    (WEIGHTS, "query", np.ones(8), ValueError, "at least 2 dimensions"),
    (WEIGHTS, "mask", np.ones((3, 4), dtype=bool), ValueError, "scores"),
    (WEIGHTS, "return_logsumexp", 1, TypeError, "True or False"),
    *(("merge_attention", n, *case) for n in ("outs", "logsumexps") for case in NO_ARRAY),
    *(("merge_attention", n, None, TypeError, "be an array") for n in ("outs", "logsumexps")),
    ("merge_attention", "outs", X[0, 0], ValueError, "at least 3 dimensions"),
    ("merge_attention", "outs", X.astype(int), TypeError, "float64"),
    ("merge_attention", "logsumexps", np.ones((2, 4, 6)), ValueError, r"\(2, 4, 5\)"),
    ("merge_attention", "logsumexps", np.ones((2, 4, 5), dtype=np.float32), TypeError, "dtype float64"),
    ("merge_attention", "logsumexps", array_api_strict.ones((2, 4, 5)), TypeError, "same backend"),
    *(("lp_pool", "norm_type", p, TypeError, "number") for p in ("2", None, True, [2])),
    *(("lp_pool", "norm_type", p, ValueError, "above 0") for p in (0, -1, -0.5)),
    *(("lp_pool", "norm_type", p, ValueError, "finite") for p in (np.inf, np.nan, 10**400)),
    *((op, "x", *case) for op in (*ADAPTIVE, "max_unpool") for case in NO_ARRAY),
    *((op, "x", None, TypeError, "be an array") for op in (*ADAPTIVE, "max_unpool")),
    *((op, "x", np.ones((2, 2, 2), dtype=bool), TypeError, "float") for op in ADAPTIVE),
    *((op, "output_size", *case) for op in ADAPTIVE for case in (*NO_INT, (0, ValueError, "at least 1"))),
    *((op, "output_size", (1, 0), ValueError, "at least 1") for op in ADAPTIVE),
    *((op, "output_size", (), ValueError, "1 to 4 entries") for op in ADAPTIVE),
    *((op, "output_size", (1,) * 5, ValueError, "1 to 4 entries") for op in ADAPTIVE),
    *((op, "output_size", (1, 2.0), TypeError, "be an int") for op in ADAPTIVE),
    *((op, "output_size", 2**41, ValueError, "at most") for op in ADAPTIVE),
    *((op, "x", np.ones((3, 3)), ValueError, "at least 3 dimensions") for op in ADAPTIVE),
    *((op, "x", np.ones((2, 4, 0, 6)), ValueError, "at least 1") for op in (*ADAPTIVE, "max_unpool")),
    *(("adaptive_max_pool", "return_indices", *case) for case in NO_FLAG),
    *(("max_unpool", "indices", *case) for case in (*NO_ARRAY, (None, TypeError, "be an array"))),
    *(("max_unpool", "indices", INDICES.astype(d), TypeError, "int32 or int64") for d in ("i2", "u8", "f8", "?")),
    ("max_unpool", "indices", INDICES[:1], ValueError, "shape of x"),
    ("max_unpool", "indices", INDICES - 1, ValueError, r"in \[0, 120\); got values from -1 to 28"),
    ("max_unpool", "indices", INDICES + 91, ValueError, r"in \[0, 120\); got values from 91 to 120"),
    *(("max_unpool", "stride", *case) for case in NO_SIZES if case[0] is not None),
    *(("max_unpool", "kernel_size", *case) for case in NO_INT),
    ("max_unpool", "kernel_size", (1, 0), ValueError, "at least 1"),
    ("max_unpool", "kernel_size", (1,) * 5, ValueError, "1 to 4 entries"),
    *(("max_unpool", "padding", *case) for case in NO_PADDING),
    ("max_unpool", "padding", 6, ValueError, "output size of at least 1"),
    ("max_unpool", "output_size", (8, 12), ValueError, r"less than one stride \(2\) away from 10"),
    ("max_unpool", "output_size", 14, ValueError, r"away from 10"),
    ("max_unpool", "output_size", (10,), ValueError, "2 spatial dimensions"),
    ("max_unpool", "output_size", (10.0, 12), TypeError, "be an int"),
    ("max_unpool", "output_size", 0, ValueError, "at least 1"),
    *((MULTI_HEAD, n, *case) for n in ("query", "key", "value", "bias") for case in NO_FLOATING),
    *((MULTI_HEAD, "num_heads", *case) for case in NO_INT),
    (MULTI_HEAD, "num_heads", 0, ValueError, "at least 1"),
    (MULTI_HEAD, "num_heads", 3, ValueError, r"divide the projected features of query \(8\)"),
    (MULTI_HEAD, "query", np.ones(8), ValueError, "at least 2 dimensions"),
    (MULTI_HEAD, "query", np.ones((2, 3, 7)), ValueError, r"query.shape\[-1\] \(7\)"),
    (MULTI_HEAD, "query", np.ones((3, 3, 8)), ValueError, "broadcast"),
    (MULTI_HEAD, "value", np.ones((2, 4, 8)), ValueError, r"key.shape\[-2\] \(5\)"),
    (MULTI_HEAD, "key", np.ones((2, 5, 6)), ValueError, r"query.shape\[-1\] \(8\)"),
    (MULTI_HEAD, "mask", np.ones((4, 5), dtype=bool), ValueError, r"scores, \(2, 2, 3, 5\)"),
    (MULTI_HEAD, "key_lengths", np.array([5, 6]), ValueError, r"in \[0, 5\]"),
    (MULTI_HEAD, "is_causal", 1, TypeError, "True or False"),
    (MULTI_HEAD, "scale", "1", TypeError, "number"),
    (MULTI_HEAD, "params", [1], TypeError, "mapping"),
    (MULTI_HEAD, "params", {}, ValueError, "'q_proj_weight'"),
    (MULTI_HEAD, "params", PARAMS | {"weight": X}, ValueError, "got 'weight'"),
    (MULTI_HEAD, "params", PARAMS | {"bias_k": X}, ValueError, "key 'bias_v'"),
    (MULTI_HEAD, "params", PARAMS | {"bias_v": X}, ValueError, "key 'bias_k'"),
    (MULTI_HEAD, "params", PARAMS | {"bias_k": X, "bias_v": X}, ValueError, r"shape \(1, 1, 8\)"),
    (MULTI_HEAD, "num_kv_heads", 3, ValueError, r"divide num_heads \(2\)"),
    (MULTI_HEAD, "num_kv_heads", 0, ValueError, "at least 1"),
    (MULTI_HEAD, "num_kv_heads", 2.0, TypeError, "be an int"),
    (MULTI_HEAD, "num_kv_heads", True, TypeError, "be an int"),
    *((MULTI_HEAD, n, *case) for n in ("need_weights", "average_weights", "add_zero_attn") for case in NO_FLAG),
    (MULTI_HEAD, "dropout_p", 0.5, ValueError, "be 0 without a dropout_mask"),
    (MULTI_HEAD, "dropout_mask", np.ones((3, 6), dtype=bool), ValueError, r"weights, \(2, 2, 3, 5\)"),
    (MULTI_HEAD, "params", PARAMS | {"q_proj_weight": X}, ValueError, "got 'q_proj_weight' as well"),
    (MULTI_HEAD, "params", {"in_proj_weight": np.ones((24, 8))}, ValueError, "key 'out_proj.weight'"),
    (MULTI_HEAD, "params", {"q_proj_weight": np.ones((8, 8))}, ValueError, "key 'k_proj_weight'"),
    (MULTI_HEAD, "params", PARAMS | {"in_proj_weight": np.ones((8, 24))}, ValueError, r"shape \(24, 8\)"),
    (MULTI_HEAD, "params", PARAMS | {"in_proj_bias": np.ones(23)}, ValueError, r"shape \(24,\)"),
    (MULTI_HEAD, "params", PARAMS | {"in_proj_bias": None}, TypeError, "be an array"),
    (MULTI_HEAD, "params", PARAMS | {"in_proj_bias": [1]}, TypeError, "be a NumPy array"),
    (MULTI_HEAD, "params", PARAMS | {"in_proj_bias": np.ones(24, dtype="f4")}, TypeError, "same dtype"),
    (MULTI_HEAD, "params", PARAMS | {"out_proj.weight": np.ones(8)}, ValueError, "2 dimensions"),
    (MULTI_HEAD, "params", PARAMS | {"out_proj.weight": np.ones((8, 7))}, ValueError, r"shape \(8, 8\)"),
    (MULTI_HEAD, "params", PARAMS | {"out_proj.bias": np.ones(7)}, ValueError, r"shape \(8,\)"),
    (MULTI_HEAD, "params", SEPARATE | {"k_proj_weight": np.ones((6, 8))}, ValueError, r"shape \(8, 8\)"),
    (MULTI_HEAD, "params", SEPARATE | {"v_proj_weight": np.ones((5, 8))}, ValueError, r"shape \(5, 5\)"),
    (MULTI_HEAD, "params", SEPARATE | {"v_proj_weight": np.ones((6, 7))}, ValueError, r"shape \(6, 8\)"),
]


def label(case):
    op, argument, value, *_ = case
    return f"{op}-{argument}-{getattr(value, 'shape', value)!r:.40}"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", WRONG, ids=label)
def test_wrong_arguments(case, direction):
    op, argument, value, error, rule = case
    arguments = VALID[op] | {argument: value}
    function = getattr(refimpl, op)
    if direction == "backward":
        out = function(**VALID[op])
        arguments["dout"] = out[0] if isinstance(out, tuple) else out
        function = getattr(refimpl, f"{op}_backward")
    with pytest.raises(error, match=rf"^{function.__name__}: .+ must .*; got ") as raised:
        function(**arguments)
    message = str(raised.value)
    assert re.search(rule, message)
    assert argument in message or "the result" in message


@pytest.mark.parametrize("op", VALID)
@pytest.mark.parametrize(
    ("dout", "error", "rule"),
    [
        (None, TypeError, "be an array"),
        (np.ones((1, 1)), ValueError, "shape of the result"),
        (np.ones((2, 2), dtype=np.float32), TypeError, "dtype"),
        ([1.0], TypeError, "NumPy array"),
    ],
)
def test_wrong_dout(op, dout, error, rule):
    function = getattr(refimpl, f"{op}_backward")
    with pytest.raises(error, match=rf"^{function.__name__}: dout must .*{rule}.*; got "):
        function(dout, **VALID[op])


@pytest.mark.parametrize(
    ("indices", "error", "rule"),
    [
        (np.zeros((2, 4, 2, 3)), TypeError, "int64"),
        (np.zeros((2, 4, 2, 3), dtype=np.int32), TypeError, "int64"),
        (np.zeros((2, 4, 2, 2), dtype=np.int64), ValueError, "shape of the result"),
        ([0], TypeError, "NumPy array"),
    ],
)
def test_wrong_indices(indices, error, rule):
    with pytest.raises(error, match=rf"^max_pool_backward: indices must .*{rule}.*; got "):
        refimpl.max_pool_backward(np.ones((2, 4, 2, 3)), X, 2, indices=indices)


@pytest.mark.parametrize(
    ("options", "argument", "rule"),
    [
        ({"num_kv_heads": 1}, "params", "have q_proj_weight, k_proj_weight and v_proj_weight"),
        ({"num_kv_heads": 1, "params": None}, r"key.shape\[-1\]", r"equal query.shape\[-1\] \(8\) / 2"),
        ({"num_kv_heads": 1, "params": SEPARATE}, "params['k_proj_weight']", r"have shape \(4, 8\)"),
        ({"params": None, "need_weights": True, "num_heads": 16}, "num_heads", "divide the features of query"),
        ({"dropout_mask": np.ones((3, 5), dtype=bool), "add_zero_attn": True}, "dropout_mask", r"\(2, 2, 3, 6\)"),
        ({"mask": np.ones((3, 6), dtype=bool), "add_zero_attn": True}, "mask", r"scores, \(2, 2, 3, 5\)"),
    ],
)
def test_wrong_combinations_in_multi_head_attention(options, argument, rule):
    argument = argument.replace("['", r"\['").replace("']", r"'\]")
    with pytest.raises(ValueError, match=rf"^{MULTI_HEAD}: {argument} must .*{rule}.*; got "):
        refimpl.multi_head_attention(**VALID[MULTI_HEAD] | options)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_padding_that_the_elements_cannot_fill(mode):
    limit = 4 if mode == "reflect" else 5
    refimpl.conv(X, WEIGHT, groups=2, padding=[limit, 0], padding_mode=mode)
    rule = f"be at most {limit} in spatial dimension 0 of size 5 with padding_mode='{mode}'"
    with pytest.raises(ValueError, match=rf"^conv: padding must {rule}; got {limit + 1} and 0$"):
        refimpl.conv(X, WEIGHT, groups=2, padding=[(limit + 1, 0), 0], padding_mode=mode)


@pytest.mark.parametrize("op", [ATTENTION, WEIGHTS, "merge_attention"])
@pytest.mark.parametrize(
    ("dlogsumexp", "error", "rule"),
    [
        (np.ones((1, 1)), ValueError, "shape of the logsumexp"),
        (np.ones((2, 4, 3), dtype=np.float32), TypeError, "dtype float64"),
        (np.ones((2, 4, 3), dtype=int), TypeError, "dtype float64"),
        ([1.0], TypeError, "NumPy array"),
        (array_api_strict.ones((2, 4, 3)), TypeError, "same backend"),
    ],
)
def test_wrong_dlogsumexp(op, dlogsumexp, error, rule):
    function = getattr(refimpl, f"{op}_backward")
    out = getattr(refimpl, op)(**VALID[op])
    dout = out[0] if op == "merge_attention" else out
    with pytest.raises(error, match=rf"^{function.__name__}: dlogsumexp must .*{rule}.*; got "):
        function(dout, **VALID[op], dlogsumexp=dlogsumexp)


@pytest.mark.parametrize(
    ("options", "argument", "rule"),
    [
        ({"output_padding": 1, "output_size": (11, 13)}, "output_padding", "be 0 when output_size is given"),
        ({"output_size": 12, "padding": "same_lower"}, "output_size", "be left out with padding='same_lower'"),
    ],
)
def test_options_that_exclude_each_other(options, argument, rule):
    with pytest.raises(ValueError, match=rf"^conv_transpose: {argument} must {re.escape(rule)}.*; got "):
        refimpl.conv_transpose(**VALID["conv_transpose"], stride=2, **options)


def test_the_message_of_the_style_guide():
    message = (
        "conv: x.shape[1] must equal weight.shape[1] * groups (3 * 2 = 6); "
        "got x.shape=(2, 5, 8, 8), weight.shape=(4, 3, 3, 3), groups=2"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refimpl.conv(np.ones((2, 5, 8, 8)), np.ones((4, 3, 3, 3)), groups=2)


def test_numpy_numbers_and_lists_are_fine_as_options():
    two, half = np.int32(2), np.float32(0.5)
    refimpl.conv(X, WEIGHT, stride=[two, 1], padding=[[1, two], np.int64(0)], groups=two)
    refimpl.conv_transpose(np.ones((2, 6, 5, 6)), WEIGHT, output_size=[np.int64(7), 8])
    refimpl.max_pool(X, [two, 2], stride=two)
    refimpl.avg_pool(X, two, divisor_override=np.int8(3))
    refimpl.scaled_dot_product_attention(QUERY, KEY, VALUE, window=[two, None], query_offset=two, scale=half)
    refimpl.multi_head_attention(TOKENS, MEMORY, MEMORY, num_heads=two, scale=half)
    refimpl.scaled_dot_product_attention(QUERY, KEY, VALUE, softcap=np.float16(1), scale=np.float16(1))
    refimpl.lp_pool(X, np.float16(3), two)


@pytest.mark.parametrize("huge", [2**20, 2**40])
def test_huge_windows_are_no_work(huge):
    """Windows far larger than x, and far apart, cost what x costs."""
    x = np.arange(3.0)[None, None]
    assert refimpl.max_pool(x, huge, padding=huge // 2).tolist() == [[[2.0]]]
    assert refimpl.avg_pool(x, huge, padding=huge // 2, count_include_pad=False).tolist() == [[[1.0]]]
    assert refimpl.avg_pool(x, huge, padding=huge // 2).tolist() == [[[3.0 / huge]]]
    assert refimpl.avg_pool_backward(np.ones((1, 1, 1)), x, huge, padding=huge // 2).tolist() == [[[1 / huge] * 3]]
    assert refimpl.conv(x, np.ones((1, 1, 1)), stride=huge).tolist() == [[[0.0]]]
    dilated = refimpl.conv(x, np.ones((1, 1, 3)), dilation=huge, padding=huge)
    assert dilated.tolist() == [[[0.0, 1.0, 2.0]]]
    with pytest.raises(ValueError, match="every window; window 3 of"):
        refimpl.max_pool(x, 2, dilation=huge, padding=huge, stride=1)


def test_small_integer_types_do_not_overflow():
    x, weight = np.ones((1, 256, 3)), np.ones((128, 2, 2))
    np.testing.assert_array_equal(refimpl.conv(x, weight, groups=np.uint8(128)), refimpl.conv(x, weight, groups=128))
    dout = np.ones((1, 128, 2))
    grads = refimpl.conv_backward(dout, x, weight, groups=np.uint8(128))
    np.testing.assert_array_equal(grads.dx, refimpl.conv_backward(dout, x, weight, groups=128).dx)
    out = refimpl.conv_transpose(np.ones((1, 3, 3)), np.ones((3, 100, 2)), groups=np.uint8(3))
    assert out.shape == (1, 300, 4)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("conv", {"x": np.zeros((0, 1, 9, 9)), "weight": np.ones((1, 1, 1, 1)), "padding": 2**40}),
        ("conv_transpose", {"x": np.zeros((0, 1, 9, 9)), "weight": np.ones((1, 1, 1, 1)), "stride": 2**40}),
        ("max_pool", {"x": np.zeros((0, 9, 9)), "kernel_size": (2**38, 2**38), "padding": 2**38 - 1, "stride": 1}),
        (
            ATTENTION,
            {
                "query": np.broadcast_to(0.0, (2**40, 1, 2**15, 1)),
                "key": np.ones((4, 1)),
                "value": np.broadcast_to(0.0, (4, 2**10)),
            },
        ),
    ],
)
def test_a_result_too_large_to_address(op, arguments):
    with pytest.raises(ValueError, match=rf"^{op}: the result must have at most \d+ elements; got shape"):
        getattr(refimpl, op)(**arguments)


@pytest.mark.parametrize(("name", "sign"), [("stride", -1), ("padding", 1), ("groups", 1)])
def test_numbers_too_long_to_print(name, sign):
    value = sign * 10**5000
    with pytest.raises(ValueError, match=rf"^conv: {name} must be at .*; got int beyond printing"):
        refimpl.conv(X, WEIGHT, **{"groups": 2, name: value})


def test_an_error_comes_before_any_work():
    """The arguments of a call far too large to compute are still only looked at."""
    vast = np.broadcast_to(np.ones(1), (1, 1, 2**40))
    with pytest.raises(ValueError, match="conv: bias must have shape"):
        refimpl.conv(vast, np.ones((1, 1, 1)), np.ones(2))
    with pytest.raises(ValueError, match="scaled_dot_product_attention: mask must broadcast"):
        refimpl.scaled_dot_product_attention(vast, vast, vast, mask=np.ones((2, 2, 2), dtype=bool))


def test_padding_that_cannot_be_filled():
    x, weight = np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1))
    options = {"padding": 1 << 33, "stride": 1 << 33}
    assert refimpl.conv(x, weight, **options).shape == (1, 1, 3, 3)
    with pytest.raises(ValueError, match=r"^conv: padding must fill x up to at most \d+ elements with padding_mode="):
        refimpl.conv(x, weight, **options, padding_mode="replicate")


@pytest.mark.parametrize("padding", ["same", "same_lower"])
def test_same_sets_the_size_of_what_is_unpooled(padding):
    with pytest.raises(ValueError, match=rf"^max_unpool: output_size must be left out with padding='{padding}'"):
        refimpl.max_unpool(**VALID["max_unpool"], padding=padding, output_size=(10, 12))


def test_weights_too_large_to_address():
    vast = np.broadcast_to(0.0, (1, 2**31, 1))
    with pytest.raises(ValueError, match=rf"^{MULTI_HEAD}: the result must have at most"):
        refimpl.multi_head_attention(vast, vast, vast, num_heads=1, need_weights=True)


def test_a_logsumexp_beside_half_types_is_float32():
    outs = np.ones((2, 4, 5), dtype=np.float16)
    with pytest.raises(
        TypeError, match=r"^merge_attention: logsumexps must be of dtype float32, as a .* beside float16 is"
    ):
        refimpl.merge_attention(outs, np.ones((2, 4), dtype=np.float16))
