"""Training steps of pretrain.py, without a run folder."""

import torch
from tqdm import tqdm

import pretrain
from common import ContrastiveModel, precision
from datasets.loader import ImageReader
from utils.cli import Stop
from utils.runs import make_generator

EPOCHS = 4


class TrainingRun:
    """Network, method and optimizer that pretrain.py would train with the given flags."""

    def __init__(self, flags, subset, args, device):
        """flags: those of pretrain.py that differ from its defaults, as one string.

        args: --batch-size, --steps and --amp of the benchmark.
        """
        words = ["synthetic", *flags.split(), "--epochs", str(EPOCHS)]
        self.options = pretrain.parse_args([*words, "--batch-size", str(args.batch_size)])
        self.subset, self.steps = subset, args.steps
        self.reader = ImageReader(subset.images, subset.splits["train"], device)
        _, self.autocast, self.scaler = precision(device, args.amp, subset.size)
        torch.manual_seed(0)
        self.model = ContrastiveModel(self.options.arch, pretrain.PROJECTION_DIM).to(device)
        method = pretrain.METHODS[self.options.method]
        self.method = method(self.options, subset, self.model, make_generator(0)).to(device)
        parameters = [*self.model.parameters(), *self.method.parameters()]
        trainable = [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=pretrain.MOMENTUM)

    def train_epoch(self, epoch=0, folder=None):
        """Train one epoch of `steps` steps and return its log line."""
        with tqdm(disable=True) as bar:
            return pretrain.train_one_epoch(
                epoch,
                self.steps,
                self.model,
                self.method,
                self.optimizer,
                self.scaler,
                self.autocast,
                self.reader,
                self.subset,
                self.options,
                folder,
                bar,
                Stop(),
            )

    def train_on(self, views, labels, network):
        """Train `steps` steps on one batch of finished views, through `network`."""
        for _ in range(self.steps):
            with self.autocast:
                loss = self.method(network, views, labels, None, None)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
