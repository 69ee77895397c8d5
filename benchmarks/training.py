"""Training steps of pretrain.py, without a run folder."""

import tempfile
from functools import partial

import torch

import pretrain
from common import Amp, ContrastiveModel, train_one_epoch
from datasets.loader import Batch, BatchLoader
from utils.encoders import resolve_stem

EPOCHS = 4
# Small, so that no loss diverges in the rounds of a benchmark.
FLAGS = f"--epochs {EPOCHS} --lr 0.001"


class TrainingRun:
    """Network, method and optimizer that pretrain.py would train with the given flags."""

    def __init__(self, flags, subset, args, device):
        """flags: of pretrain.py, one string; args: --batch-size, --steps and --amp."""
        words = f"synthetic {flags} {FLAGS} --batch-size {args.batch_size}"
        self.options = pretrain.parse_args(words.split())
        self.steps, self.amp = args.steps, Amp(device, args.amp, subset.size)
        torch.manual_seed(0)
        arch = self.options.arch
        stem = resolve_stem(arch, self.options.stem, subset.size)
        self.model = ContrastiveModel(arch, pretrain.PROJECTION_DIM, stem=stem).to(device)
        self.method = pretrain.build_method(self.options, self.model, subset).to(device)
        self.optimizer = pretrain.build_optimizer(self.options, self.model, self.method)
        rows = subset.splits["train"][: args.batch_size * args.steps]
        sampler = pretrain.make_sampler(self.options, subset, rows)
        views = self.method.views, self.method.randaugment_views
        self.loader = BatchLoader(subset, rows, device, sampler, *views)

    def train_epoch(self, epoch=0):
        """Train an epoch of `steps` steps as pretrain.py does."""
        pretrain.start_epoch(epoch, self.options, self.model, self.method, self.optimizer)
        loss_of_batch = partial(self.method, self.model)
        batches, folder = self.loader.epoch(epoch, seed=0), tempfile.gettempdir()
        train_one_epoch(loss_of_batch, batches, self.optimizer, self.amp, folder)

    def train_on(self, batch):
        """Train `steps` steps on one batch of finished views."""
        for _ in range(self.steps):
            with self.amp.autocast:
                loss = self.method(self.model, batch)
            self.amp.step(loss, self.optimizer)


def call_without_trials(function):
    """Call a function while cuDNN chooses its algorithms without trying them."""
    torch.backends.cudnn.benchmark = False
    function()
    torch.backends.cudnn.benchmark = True


def draw_batch(images, size, device):
    """Draw a Batch of two finished views of random images, half of them minority."""
    views = torch.randn(2, images, 3, size, size, device=device)
    labels = torch.arange(images, device=device) % 2
    return Batch(views, labels, labels.cpu(), positions=None, generator=None)
