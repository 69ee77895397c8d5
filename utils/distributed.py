"""Training on several GPUs by torchrun: the result equals that of one process, up to rounding.

Every rank draws order and augmentation for the whole batch and passes its own images through the
network. `gather_views` gives every rank the features of all images, so each rank computes the loss
of the whole batch. Each takes the gradient of loss / world size, and gradients are summed. Batch
norm uses the statistics of all images. In a single process all functions here do nothing.
"""

import functools
import os
import signal
import sys
from contextlib import redirect_stdout

import torch
import torch.distributed as dist
import torch.nn as nn

from utils.cli import SIGNALS, UserError


def torchrun_main(main):
    """Decorate a script's main() so that torchrun can start it; only rank 0 prints.

    Raises UserError if the processes cannot connect, or if one of them is lost.
    """

    @functools.wraps(main)
    def run(*args):
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return main(*args)
        connect()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            try:
                main(*args)
            except RuntimeError as error:
                if "gloo" not in str(error):
                    raise
                raise UserError(
                    "another process of this run has ended; run the same command again to continue"
                ) from None
            dist.destroy_process_group()

    return run


def connect():
    """Join the process group that torchrun describes in the environment."""
    if not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        world = os.environ["WORLD_SIZE"]
        raise UserError(f"WORLD_SIZE is {world}, but not from torchrun; use torchrun, or unset it")
    # Python handlers do not run while torch waits for the other processes.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"torchrun: cannot connect ({reason}); check --rdzv-endpoint") from None
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pick_device(name, deterministic=None):
    """Return the torch.device for --device; under torchrun each local rank gets its own GPU.

    auto: CUDA if there is any. deterministic: True for algorithms that give the same bits each
    time; False, in training, for the fastest ones, which cuDNN finds by trial for each input
    shape; None for torch's choice. Raises UserError if CUDA is asked for and absent, or if a
    machine has too few GPUs.
    """
    if deterministic:
        # cuBLAS reads this variable before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = deterministic is False
    if os.environ.get("WORLD_SIZE", "1") != "1" and world_size() == 1:
        raise UserError("this script uses one device; start it with python, not with torchrun")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world_size() == 1:
        return torch.device("cuda")
    available, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if wanted > available:
        raise UserError(f"torchrun: {wanted} processes, {available} GPUs; lower --nproc-per-node")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Return the number of this process; rank 0 reads and writes the run folder and prints."""
    return dist.get_rank() if world_size() > 1 else 0


def local_slice():
    """Return the slice of a batch that this rank processes: every world_size-th image."""
    return slice(rank(), None, world_size())


def on_rank_zero(function, *args):
    """Call the function on rank 0 while the other ranks wait."""
    if rank() == 0:
        function(*args)
    if world_size() > 1:
        # An all_reduce of a CPU tensor: it waits for the processes, not for a GPU.
        dist.all_reduce(torch.zeros(1))


def assert_same_on_all_ranks(value, message):
    """Raise UserError(message) unless every rank has the same value, which can be pickled."""
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise UserError(message)


class _Sum(torch.autograd.Function):
    """Sum over ranks. Each counts its share of the loss, so the gradients are summed, too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    backward = forward


def gather_views(x):
    """[..., n, D] of this rank's images -> [..., N, D] of all images, with gradient."""
    if world_size() == 1:
        return x
    local = at_least_float32(x)
    everything = local.new_zeros(*x.shape[:-2], x.shape[-2] * world_size(), x.shape[-1])
    everything[..., local_slice(), :] = local
    # Every other rank holds zeros in these rows, so the sum is exact.
    return _Sum.apply(everything)


def sum_gradients(parameters):
    """Sum the gradients of loss / world size over all ranks: the gradient of the loss."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        totals = flat.split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))


def broadcast_buffers(module):
    """Give every rank the buffers of rank 0: GPUs may differ in the last bits."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def convert_sync_batchnorm(model):
    """Return the model with batch norm over the images of all ranks; state_dict keys stay."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over all ranks on the CPU, where torch.nn.SyncBatchNorm does not run.

    Every rank has the same number of images.
    """

    def forward(self, x):  # [n, C, H, W]
        if not self.training:
            return super().forward(x)
        x32 = at_least_float32(x)
        var, mean = torch.var_mean(x32, (0, 2, 3), correction=0)
        # [world size, C] each
        means, variances = gather_views(torch.stack([mean, var])[:, None])
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        n = world_size() * x.numel() / len(mean)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        centred = x32 - mean[:, None, None]
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
