"""Several GPUs: one process for each, started by torchrun. Every process has a share of the heads
when it generates, and a share of the dictionaries when it learns."""

import atexit
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn as nn

from model import InputError, best_device, door

def world(device=None):
    """(device, rank, ranks): what to compute on, and which of how many processes this one is.
    Without torchrun, 0 of 1. Under it, every rank has a GPU of its own, and only 0 prints."""
    with door(f"--device {device} cannot be used here", "leave it out, or say cpu"):
        device = torch.device(device or best_device())
        if device.type == "cuda":  # kernels and graphs go to what is the current one
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            if device.index >= torch.cuda.device_count():
                raise ValueError(f"torch finds {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(device)
        elif device.index:
            raise ValueError(f"there is one {device.type}")
        torch.empty(1, device=device).cpu()
    if "LOCAL_RANK" not in os.environ:
        return device, 0, 1
    if not dist.is_initialized():
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device, dist.get_rank(), dist.get_world_size()

def parallelize(model, rank, ranks):
    """Leave in a model this rank's share of all heads and hidden units (Shoeybi et al. 2019, arXiv
    1909.08053). Its config then counts the heads that are here: a cache made from it holds theirs.
    By hand, for torch's DTensor takes milliseconds of Python a layer, however small the shares."""
    for name in ("kv_heads", "ffn_dim"):
        if getattr(model.config, name) % ranks:
            raise InputError(f"the model's {name} = {getattr(model.config, name)} cannot be shared "
                             f"by {ranks} processes; give --nproc-per-node a divisor of it")
    for name, linear in model.layers.named_modules() if ranks > 1 else ():
        if name.endswith(("o_proj", "down_proj")):  # inputs are shared: outputs are sums over ranks
            linear.weight = nn.Parameter(linear.weight.chunk(ranks, dim=1)[rank])
            if linear.bias is not None:  # counts once
                linear.bias = nn.Parameter(linear.bias * (rank == 0))
            linear.register_forward_hook(lambda linear, x, out: dist.all_reduce(out))
        elif name.endswith("_proj"):  # outputs are shared
            for part, whole in list(linear.named_parameters()):
                setattr(linear, part, nn.Parameter(whole.chunk(ranks)[rank]))
    model.config = replace(model.config, n_heads=model.config.n_heads // ranks,
                           kv_heads=model.config.kv_heads // ranks)
    return model.requires_grad_(False)

def from_rank_0(read):
    """What read() gives on rank 0, or the InputError that it raises, on every rank."""
    try:
        result = [read()] if not dist.is_initialized() or dist.get_rank() == 0 else [None]
    except InputError as error:
        result = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], InputError):
        raise result[0]
    return result[0]

def gather(x, dim=0):
    """The x of all ranks, one after the other along a dimension."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)
