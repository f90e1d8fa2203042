"""What PyTorch's kernels silently assume of their operands' memory, and what they give unasked."""

from __future__ import annotations

from collections.abc import Mapping

# Operands (by their place among the tensors) that a kernel reads as if they lay row by row; elsewhere it reads other numbers, or refuses.
CONTIGUOUS: Mapping[str, tuple[int, ...]] = {
    "aten.native_layer_norm_backward": (2, 3),  # mean and reciprocal deviation
    "aten.adaptive_max_pool3d_backward": (2,),
    "aten._linalg_det": (0,),  # its factors are those of the transpose otherwise
    "aten._linalg_slogdet": (0,),
    "aten.linalg_matrix_exp": (0,),
    "aten._pdist_forward": (0,),
    "aten._pdist_backward": (1,),
}

# The argument that says which results are wanted, of ops whose kernels may give others too; elsewhere what is not wanted comes as None.
MASKED: Mapping[str, int] = {"aten.convolution_backward": 10}  # oneDNN: the weight's gradient together with the bias's

# Operands of attention without a mask: what back ends that write it on their own take.
UNMASKED: Mapping[str, int] = {"sdpa": 3, "sdpa_backward": 6}

PRODUCT, BIASED = "aten.mm", "aten.addmm"

# Ops that compare (their names without the overload), and the sign that Python and C++ have for each.
COMPARE: Mapping[str, str] = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

# The fewest rows of a product that a back end for CPUs writes itself: of fewer its tiles are uneven.
LEAST_ROWS = 85
