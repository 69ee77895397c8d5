"""Batches of a subset: packed images are read ahead, and views are made on the device."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from datasets.augment import augment_views, center_view, normalize
from utils.cli import UserError
from utils.distributed import local_slice
from utils.runs import make_generator

READERS = 4  # threads that read images


@dataclass
class Batch:
    """N images of a batch; this rank holds the views of n = N / world size of them."""

    x: torch.Tensor  # float32 [V, n, 3, S, S], normalised
    labels: torch.Tensor  # int64 [N]
    cpu_labels: torch.Tensor  # the same on the CPU; to read them is no wait for the GPU
    positions: torch.Tensor  # int64 [N], index of each image among the training rows
    generator: torch.Generator  # of the epoch, on the CPU, the same on all ranks


class BatchLoader:
    """Normalised views of training images, in batches that are drawn anew in each epoch.

    rows: int [n], the training rows. sampler: generator -> list of arrays of positions in `rows`.
    randaugment_views: indices of the views that also get RandAugment. augmented=False gives the
    evaluation view.
    """

    def __init__(
        self, subset, rows, device, sampler, views=1, randaugment_views=(), augmented=True
    ):
        self.subset, self.rows, self.device, self.sampler = subset, rows, device, sampler
        self.views, self.randaugment_views, self.augmented = views, randaugment_views, augmented
        self.reader = ImageReader(subset.images, rows, device)

    def epoch(self, epoch, seed):
        """Return the batches of an epoch; the same epoch and seed draw the same."""
        return EpochBatches(self, epoch, make_generator(seed, epoch))

    def make_views(self, images, sizes, generator):
        """uint8 [n, C, S, S] of this rank and sizes [N, 2] of all -> [V, n, 3, size, size]."""
        subset, shard = self.subset, local_slice()
        if self.augmented:
            strong = [view in self.randaugment_views for view in range(self.views)]
            size, recipe = subset.size, subset.augmentation()
            x = augment_views(images, sizes, recipe, size, generator, strong, shard).flatten(0, 1)
        else:
            x = center_view(images, sizes[shard], subset.size).repeat(self.views, 1, 1, 1)
        return normalize(x, subset.mean, subset.std).unflatten(0, (self.views, -1))


class EpochBatches:
    """The batches of one epoch: iterable once, with a length."""

    def __init__(self, loader, epoch, generator):
        self.loader, self.epoch, self.generator = loader, epoch, generator
        self.device, self.positions = loader.device, loader.sampler(generator)

    def __len__(self):
        return len(self.positions)

    def __iter__(self):
        loader = self.loader
        for positions, images in loader.reader(self.positions, local_slice()):
            rows = loader.rows[positions]
            sizes = torch.from_numpy(loader.subset.sizes[rows])
            labels = torch.from_numpy(loader.subset.labels[rows])
            yield Batch(
                x=loader.make_views(images, sizes, self.generator),
                labels=labels.to(self.device, non_blocking=True),
                cpu_labels=labels,
                positions=torch.from_numpy(positions).to(self.device, non_blocking=True),
                generator=self.generator,
            )


class ImageReader:
    """Read packed uint8 images of some rows, one batch at a time, onto the device.

    On CUDA the images stay resident if they fill less than half of the free memory. Otherwise
    threads read one batch ahead, and it is copied while the GPU computes.
    """

    def __init__(self, images, rows, device):
        """images: uint8 [M, S, S, C], an array or memory map; rows: int [n]."""
        # Views of a plain array are made faster than views of a memory map.
        self.images, self.rows, self.device = np.asarray(images), np.asarray(rows), device
        n_bytes = int(np.prod(images.shape[1:])) * len(self.rows)
        self.resident = None
        if device.type == "cuda" and n_bytes < torch.cuda.mem_get_info(device)[0] / 2:
            shape = len(self.rows), *images.shape[1:]
            resident = torch.empty(shape, dtype=torch.uint8, device=device)
            # In blocks, so that the host never holds all images.
            for block, read in self(np.array_split(np.arange(len(rows)), len(rows) // 1024 + 1)):
                resident[block[0] : block[-1] + 1] = read.permute(0, 2, 3, 1)
            self.resident = resident

    def __call__(self, batches, shard=slice(None)):
        """Yield (positions, uint8 [b, C, S, S]) for each array of positions in `batches`.

        shard: the slice of each batch whose images are read. The images are a view of [b, S, S, C];
        on the CPU their memory is written again once the next batch is asked for.
        """
        if self.resident is not None:
            for positions in batches:
                index = torch.as_tensor(positions[shard]).to(self.device, non_blocking=True)
                yield positions, self.resident[index].permute(0, 3, 1, 2)
            return
        rows = [self.rows[positions[shard]] for positions in batches]
        shape = max(map(len, rows), default=0), *self.images.shape[1:]
        # Threads fill one buffer while the images of the other one are in use.
        buffers = [HostBuffer(shape, self.device) for _ in range(2)]
        with ThreadPoolExecutor(READERS) as pool:
            reads = buffers[0].start_read(self.images, rows[0], pool) if rows else []
            for i, positions in enumerate(batches):
                for read in reads:
                    read.result()
                images = buffers[i % 2].copy_to_device(len(rows[i]))
                if i + 1 < len(batches):
                    reads = buffers[1 - i % 2].start_read(self.images, rows[i + 1], pool)
                yield positions, images.permute(0, 3, 1, 2)


class HostBuffer:
    """Memory of the host for the images of a batch; pinned for CUDA, with a stream for copies."""

    def __init__(self, shape, device):
        self.device, is_cuda = device, device.type == "cuda"
        self.images = torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda)
        self.stream = torch.cuda.Stream(device) if is_cuda else None

    def start_read(self, images, rows, pool):
        """Let threads copy rows of `images` here, in the order of the file; return the futures."""
        shards = np.array_split(np.argsort(rows), READERS)
        return [pool.submit(self._read, images, rows, shard) for shard in shards]

    def _read(self, images, rows, positions):
        if self.stream is not None:
            # The last batch of this buffer must have left it.
            self.stream.synchronize()
        target = self.images.numpy()
        # np.take would need a contiguous target, but rows in the order of the file are scattered.
        for i in positions:
            target[i] = images[rows[i]]

    def copy_to_device(self, n):
        """Return the first n images on the device; on the CPU they are no copy."""
        if self.stream is None:
            return self.images[:n]
        with torch.cuda.stream(self.stream):
            images = self.images[:n].to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        images.record_stream(current)
        return images


def check_batch_size(batch_size, rows, subset):
    """Raise UserError if the training rows do not fill a batch."""
    if batch_size > len(rows):
        raise UserError(
            f"--batch-size {batch_size}: exceeds the {len(rows)} training images of "
            f"{subset.path}; use --batch-size {len(rows)} or less"
        )


def shuffled_batches(n, batch_size, generator):
    """Cut a permutation of range(n) into full batches; the remainder is left out.

    Returns a list of int arrays [batch_size].
    """
    order = torch.randperm(n, generator=generator)
    return [batch.numpy() for batch in order.split(batch_size) if len(batch) == batch_size]


def guarantee_minority(batches, is_minority, k, generator):
    """Replace majority images until every batch holds at least k minority images.

    batches: arrays of positions; is_minority: bool [n], true at least k times. No image stands
    twice in a batch, but a minority image may stand in several batches of an epoch.
    """
    members, filled = np.flatnonzero(is_minority), []
    for batch in batches:
        spare = members[~np.isin(members, batch)]
        majority = np.flatnonzero(~is_minority[batch])
        lacking = max(0, k - (len(batch) - len(majority)))
        # Spread over the batch, since --chunk cuts it into pieces.
        replaced = majority[np.arange(lacking) * len(majority) // max(lacking, 1)]
        batch = batch.copy()
        batch[replaced] = spare[torch.randperm(len(spare), generator=generator)[:lacking]]
        filled.append(batch)
    return filled


def balanced_batches(labels, batch_size, steps, generator, run_length=4):
    """Draw class-balanced batches: the classes in turn, in a random order each round.

    labels [n]. Each class gives `run_length` images of its own shuffled list, which is shuffled
    again when it is used up. Returns `steps` int arrays [batch_size], balanced to within
    `run_length` (in batches below 8, to half of the batch). Raises ValueError for an empty class.
    Source: the sampler of cRT (Kang et al. 2020, arXiv:1910.09217).
    """
    labels, run_length = torch.as_tensor(labels), min(run_length, max(1, batch_size // 2))
    members = [(labels == c).nonzero().squeeze(1) for c in range(max(2, int(labels.max()) + 1))]
    if any(len(m) == 0 for m in members):
        raise ValueError("balanced batches need images of every class")
    lists = [rows[:0] for rows in members]
    drawn, batches = torch.empty(0, dtype=torch.long), []
    while len(batches) < steps:
        for c in torch.randperm(len(members), generator=generator).tolist():
            while len(lists[c]) < run_length:
                order = torch.randperm(len(members[c]), generator=generator)
                lists[c] = torch.cat([lists[c], members[c][order]])
            drawn = torch.cat([drawn, lists[c][:run_length]])
            lists[c] = lists[c][run_length:]
        while len(drawn) >= batch_size and len(batches) < steps:
            batches.append(drawn[:batch_size].numpy())
            drawn = drawn[batch_size:]
    return batches
