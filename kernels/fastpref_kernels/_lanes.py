"""Small @triton.jit functions over a block of a row, which is held as [groups, LANES, VECTOR].

A lane is a thread, and VECTOR elements are what one of its loads brings. Each lane has its own running maximum and
sums. So the loop over a row needs neither shuffles nor barriers. The lanes are merged once, at the row's end.
"""

import triton
import triton.language as tl

from ._math import transform_logit


@triton.jit
def as_lanes(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.reshape(x, [x.shape[0] // (LANES * VECTOR), LANES, VECTOR])


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def finite_max(m):
    # a maximum that is -inf so far (a masked vocabulary) must not become NaN in -inf - -inf
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def load_logits(
    row_ptr, cols, V,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, ACC: tl.constexpr,
    MASKED: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """A block of a row's transformed logits. The masked form is for a row's end, and reads 0 beyond it.

    Full blocks are loaded without a mask. With a mask, a V that Triton cannot prove divisible by 16 (50257, 151665)
    costs each thread sixteen 2-byte loads instead of two of 16 bytes.
    """
    if MASKED:
        z = tl.load(row_ptr + cols, mask=cols < V, other=0.0, eviction_policy=EVICTION)
    else:
        z = tl.load(row_ptr + cols, eviction_policy=EVICTION)
    return transform_logit(z.to(ACC), LOGIT_SCALE, SOFTCAP, TEMPERATURE)
