"""Several processes as one, on as many GPUs and machines as torchrun has started them: a run is the same on any number, up to rounding.

Every process draws for the whole batch and puts its own images through the network. `gather` gives all of them the features of all
images, so each computes the loss of the whole batch. It takes the gradient of loss / processes, and the gradients are summed: that is exact
for whatever lies in front of `gather` or behind it. Batch norm takes its statistics over all images.
In a process of its own nothing here does anything.
"""

import functools
import os
import signal
import sys
from contextlib import redirect_stdout

import torch
import torch.distributed as dist
import torch.nn as nn

from utils.cli import SIGNALS, Stopped, UserError


def torchrun_main(main):
    """A script's main() for each of the processes that torchrun has started; only the first one prints. UserError where one is lost."""

    @functools.wraps(main)
    def joined(*args):
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return main(*args)
        if not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not from torchrun; start with torchrun, or unset it"
            )
        handlers = {
            number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS
        }  # no Python runs while torch waits for the others
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"the processes of torchrun do not find each other ({' '.join(str(error).split())}); see its --rdzv-endpoint"
            ) from None
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            try:
                main(*args)
            except Stopped as stopped:
                if (
                    stopped.within
                ):  # all have stopped; after an error of one, the others would be waited for
                    dist.destroy_process_group()
                raise
            except RuntimeError as error:
                if "gloo" not in str(error):
                    raise
                raise UserError(
                    "another process of this run has ended; the same command goes on from the last checkpoint"
                ) from None
            dist.destroy_process_group()

    return joined


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Number of this process; 0 reads and writes the run's folder, watches and prints."""
    return dist.get_rank() if world_size() > 1 else 0


def local_slice():
    """Which images of a batch are this process's. Every so-many-th, so that a part of the batch is spread over all processes, too."""
    return slice(rank(), None, world_size())


def on_rank_zero(function, *args):
    """Process 0 calls it, while the others wait."""
    if rank() == 0:
        function(*args)
    all_reduce_max(0)


def all_reduce_max(number):
    """The highest of the processes' whole numbers. Waits for all processes, but for no GPU."""
    if world_size() == 1:
        return number
    number = torch.tensor(number)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return number.item()


def assert_same_on_all_ranks(what, way_out):
    """UserError with `way_out` unless all processes give the same, which can be pickled."""
    if world_size() > 1:
        given = [None] * world_size()
        dist.all_gather_object(given, what)
        if any(other != given[0] for other in given):
            raise UserError(way_out)


class _Sum(torch.autograd.Function):
    """Sum over processes. Each counts its share of the loss, so the gradients are summed, too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    backward = forward


def gather_views(x):
    """[..., n, D] of this process's images -> [..., N, D] of all images, in their order; with gradient."""
    if world_size() == 1:
        return x
    everything = at_least_float32(x).new_zeros(
        *x.shape[:-2], x.shape[-2] * world_size(), x.shape[-1]
    )
    everything[..., local_slice(), :] = at_least_float32(x)
    return _Sum.apply(everything)  # zeros but for the own rows: exact


def sum_gradients(parameters):
    """Of loss / processes(), whose sum is the gradient of the loss."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(
            gradients, flat.split([gradient.numel() for gradient in gradients])
        ):
            gradient.copy_(total.view_as(gradient))


def broadcast_buffers(module):
    """Give every process the buffers of the first: what a GPU computes twice may differ in its last bits, and a choice made by it wholly."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def convert_sync_batchnorm(model):
    """The model, with batch norm over the images of all processes; the keys of its state_dict stay."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over the images of all processes, on the CPU, where torch.nn.SyncBatchNorm does not run. Every process has as many."""

    def forward(self, x):  # [n, C, H, W]
        if not self.training:
            return super().forward(x)
        wide = at_least_float32(x)
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        means, variances = gather_views(torch.stack([mean, var])[:, None])  # [processes, C]
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        n = world_size() * x.numel() / len(mean)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        return ((wide - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]).to(
            x.dtype
        )
