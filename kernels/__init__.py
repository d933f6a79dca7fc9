"""What an NVIDIA GPU adds: kernels for OMP and for attention over codes, and recorded steps.

Each entry point returns what a readable function of omp.py or lexico.py returns, or None where no
kernel serves. Then torch does the work, as it always does with LEXICO_KERNELS=0."""

import functools
import os
import sys

import torch

@functools.cache
def kernels_serve(device):
    """Whether this device runs the kernels. If it is a GPU that cannot, one line says why."""
    if device.type != "cuda" or os.environ.get("LEXICO_KERNELS") == "0":
        return False
    try:
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
            raise RuntimeError("they need an NVIDIA GPU of compute capability 8.0")
        import triton  # noqa: F401 (whether it is there)
        torch.cuda._compile_kernel('extern "C" __global__ void nothing() {}', "nothing")
        return True
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        print(f"no kernels on {device} ({reason}): torch serves", file=sys.stderr)
        return False

def omp_fused(D, Y, sparsity, bits=0):
    """What solve(*pursue(D, Y, sparsity), bits) of omp.py returns; D (L, N, m), Y (L, V, m)."""
    if kernels_serve(D.device):
        from kernels.omp import launch
        return launch(D, Y, sparsity, bits)

def attend_fused(q, key_codes, value_codes, compressed, keys, values, seen):
    """What attend_codes of lexico.py returns, for one new token: q is (B, G H, 1, m)."""
    if q.shape[2] == 1 and keys.dtype == torch.bfloat16 and kernels_serve(q.device):
        from kernels.attention import launch
        return launch(q, key_codes, value_codes, compressed, keys, values, seen)
