"""Encoders: the CIFAR ResNets and torchvision's ResNets, and the weights they start from."""

import warnings
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn as nn
import torchvision
from torchvision.models.resnet import BasicBlock

from utils.archs import CIFAR_RESNETS
from utils.cli import UserError
from utils.files import read_json
from utils.runs import load_tensors, module_sha256

STEMS = ("auto", "imagenet", "cifar")
SMALL_IMAGE = 32  # pixels; up to this side, --stem auto is cifar
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class CifarResNet(nn.Module):
    """ResNet for small images: 3x3 stem, no pooling, three stages of widths 16, 32 and 64.

    x [B, 3, H, W] -> features [B, 64]. depth = 6n + 2, with n blocks of two 3x3 convolutions in
    each stage; stages 2 and 3 begin with stride 2. Source: He et al. 2016 (arXiv:1512.03385),
    section 4.2. Differs from the paper: where the shape changes, the shortcut is a 1x1 convolution
    with batch norm (torchvision's BasicBlock, option B), not padding with zeros (option A).
    """

    dim = 64

    def __init__(self, depth):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        blocks = (depth - 2) // 6
        self.layer1 = self.make_stage(16, 16, blocks, stride=1)
        self.layer2 = self.make_stage(16, 32, blocks, stride=2)
        self.layer3 = self.make_stage(32, 64, blocks, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def make_stage(width_in, width, blocks, stride):
        shortcut = None
        if stride != 1:
            shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(width),
            )
        first = BasicBlock(width_in, width, stride, shortcut)
        return nn.Sequential(first, *[BasicBlock(width, width) for _ in range(blocks - 1)])

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))  # [B, 16, H, W]
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 64, H/4, W/4]
        return x.mean(dim=(2, 3))


class Pixels(nn.Module):
    """The floor without a network: x [B, 3, H, W] -> its pixels, [B, channels * H * W]."""

    def __init__(self, channels, size):
        super().__init__()
        self.channels, self.dim = channels, channels * size**2

    def forward(self, x):
        # a grey image has three equal channels
        return x[:, : self.channels].flatten(1)


def build_encoder(arch, stem="imagenet"):
    """Build a ResNet without its classifier; `.dim` is the feature dimension.

    arch: a CIFAR ResNet (resnet8, 14, 20, 32, 44 or 56) or any ResNet of torchvision.
    stem: of torchvision's ResNets. imagenet: 7x7 convolution with stride 2 and max-pooling;
    cifar: 3x3 convolution with stride 1, no pooling. Raises UserError for another network.
    """
    if arch in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[arch]).to(memory_format=torch.channels_last)
    names = [n for n in torchvision.models.list_models(torchvision.models) if "resn" in n]
    if arch not in names:
        choices = ", ".join([*CIFAR_RESNETS, *names])
        raise UserError(f"--arch {arch}: no such network; choose one of {choices}")
    encoder = torchvision.models.get_model(arch, weights=None)
    encoder.dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, encoder.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    # Same numbers up to rounding, in the memory layout that tensor cores take.
    return encoder.to(memory_format=torch.channels_last)


def compile_training(encoder):
    """Compile the forward and backward pass in train mode; the keys of the state dict stay.

    Raises UserError if torch cannot compile here, as without a C++ compiler.
    """
    print("  --compile: the first step takes up to some minutes; later ones are faster on a GPU")
    try:
        torch.compile(torch.neg)(next(encoder.parameters()).detach())
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--compile: {reason}; install g++, or drop --compile") from None
    eager, compiled = encoder.forward, torch.compile(encoder.forward, dynamic=False)
    # In eval mode batches have several sizes, and each would be compiled anew.
    encoder.forward = lambda x: (compiled if encoder.training else eager)(x)


def resolve_stem(arch, stem, size, init=None):
    """Return the stem that --stem means for images of `size` pixels: imagenet or cifar.

    auto: cifar for CIFAR ResNets and up to 32 pixels, imagenet above and for --init imagenet.
    Raises UserError for another --stem of a CIFAR ResNet.
    """
    if arch in CIFAR_RESNETS:
        if stem != "auto":
            raise UserError(f"--stem {stem}: {arch} has its own 3x3 stem; leave --stem out")
        return "cifar"
    if stem == "auto":
        return "cifar" if size <= SMALL_IMAGE and init != "imagenet" else "imagenet"
    return stem


def feature_map_side(arch, stem, size):
    """Return the side of the last feature map for a square input of `size` pixels."""
    stride = 4 if arch in CIFAR_RESNETS else 8 if stem == "cifar" else 32
    return -(-size // stride)


def load_init(encoder, arch, init, classes):
    """Load the weights that --init names into the encoder; return their checksum.

    init: "imagenet" (torchvision's best weights of this network), a run folder, or a file of
    tensors (.pt, .pth, .safetensors). Keys are those of encoder.pt; a classifier `fc` is ignored.
    classes: names of the classes to train on; a run of other classes is loaded with a warning.
    Raises UserError that names every key that is missing, unknown or of another shape.
    """
    if init == "imagenet":
        state = download_imagenet_weights(arch)
    elif Path(init).is_dir():
        config = read_json(Path(init) / "config.json", "give a run folder, a file or imagenet")
        if config.get("classes") != classes:
            print(f"  WARNING: --init {init} was trained on the classes {config.get('classes')}")
        state = load_tensors(Path(init) / "encoder.pt")
    else:
        state = read_weights(Path(init))
    # DistributedDataParallel puts "module." before every key.
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(f"--init {init}: holds NaN or infinite weights; give other weights")
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        keys = " ".join(str(error).split()).partition(": ")[2]
        raise UserError(f"--init {init}: not weights of this {arch}; {keys}") from None
    return module_sha256(encoder)


def download_imagenet_weights(arch):
    """Return torchvision's best ImageNet weights. Raises UserError without a network or weights."""
    if arch in CIFAR_RESNETS:
        raise UserError(f"--init imagenet: torchvision has no weights of {arch}; use resnet18")
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    try:
        return weights.get_state_dict(progress=False)
    except (URLError, OSError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"--init imagenet: cannot download {weights.url} ({error}); put this file into {folder}"
        ) from None


def read_weights(path):
    """Read a file of tensors. Raises UserError if it is missing or holds anything else."""
    if not path.exists():
        raise UserError(f"--init {path}: no such file; give a run folder, a file or imagenet")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"--init {path}: needs a package; pip install safetensors") from None
        return load_file(path)
    try:
        # A pickle of another protocol causes a warning beside the exception.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch reports a foreign file by many exceptions; pickled objects are never executed.
        kind = type(error).__name__
        raise UserError(f"--init {path}: no file of tensors ({kind}); save a state_dict") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"--init {path}: holds more than named tensors; save a state_dict")
    return state
