"""Small @triton.jit functions that the kernels share. All take and return the accumulator dtype (fp32, or fp64)."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    # one multiply and one EX2, spelled out: tl.exp hides the multiply from the reader
    return tl.exp2(x * LOG2E)


@triton.jit
def log1p(x):
    # Kahan's form. It is exact where 1 + x rounds to 1, which the log-loss of a confident pair needs.
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * x / tl.where(exact, 1.0, u - 1.0))


@triton.jit
def expm1(x):
    # Kahan's form again, up to 1. Beyond that it is not needed, and would be inf / inf where e^x overflows.
    near = tl.minimum(x, 1.0)
    u = exp(near)
    exact = u == 1.0
    tiny = u < 1e-30  # to the last bit -1; the logarithm of a subnormal u would have few
    y = (u - 1.0) * near / tl.where(exact | tiny, 1.0, tl.log(tl.where(tiny, 1.0, u)))
    y = tl.where(exact, near, tl.where(tiny, -1.0, y))
    return tl.where(x > 1.0, exp(x) - 1.0, y)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    # our own, since libdevice's differs between CUDA, ROCm and the interpreter
    e = exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, t, -t)


@triton.jit
def transform_logit(z, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Head output -> logit: softcap * tanh(scale * z / softcap) / temperature. SOFTCAP = 0 means none."""
    if LOGIT_SCALE != 1.0:
        z = z * LOGIT_SCALE
    if SOFTCAP > 0.0:
        z = SOFTCAP * tanh(z / SOFTCAP)
    if TEMPERATURE != 1.0:
        z = z / TEMPERATURE
    return z


@triton.jit
def transform_slope(z, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """d logit / d head output, from the logit."""
    slope = tl.full(z.shape, LOGIT_SCALE / TEMPERATURE, z.dtype)
    if SOFTCAP > 0.0:
        t = z * (TEMPERATURE / SOFTCAP)
        slope = slope * (1.0 - t * t)
    return slope
