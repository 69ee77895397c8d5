"""Training images per second of every network, relative to torchvision's ResNet-18 at 28 px."""

from benchmarks.synthetic import synthetic_subset
from benchmarks.timing import compare_throughput, time_in_rounds
from benchmarks.training import TrainingRun

NETWORKS = {
    "resnet8": "--arch resnet8",
    "resnet20": "--arch resnet20",
    "resnet18, stem cifar": "--arch resnet18 --stem cifar",
    "resnet18, stem imagenet": "--arch resnet18 --stem imagenet",
}
REFERENCE = "resnet18, stem imagenet"  # at the first size
SIZES = (28, 32)  # pixels


def measure_networks(args, device):
    """Measure SupCon's training steps on images in memory, per image size and network."""
    images, sizes = args.batch_size * args.steps, args.sizes or SIZES
    runs = {
        (size, name): TrainingRun(flags, synthetic_subset(images, size), args, device)
        for size in sizes
        for name, flags in NETWORKS.items()
    }
    seconds = time_in_rounds({key: run.train_epoch for key, run in runs.items()}, args.rounds)
    reference = seconds[sizes[0], REFERENCE]
    results = {size: {} for size in sizes}
    for size, name in runs:
        results[size][name] = compare_throughput(seconds[size, name], reference, images)
    return {key: getattr(args, key) for key in ("batch_size", "steps", "amp")}, results
