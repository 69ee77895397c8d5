"""Encoders: the CIFAR ResNets for small images, and torchvision's ResNets."""

import torch
import torch.nn as nn
import torchvision
from torchvision.models.resnet import BasicBlock

from utils.cli import UserError

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56)


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


def build_encoder(arch):
    """Build a ResNet without its classifier; `.dim` is the feature dimension.

    arch: a CIFAR ResNet (resnet8, 14, 20, 32, 44 or 56) or any ResNet of torchvision.
    Raises UserError for another name.
    """
    cifar = {f"resnet{depth}": depth for depth in CIFAR_DEPTHS}
    if arch in cifar:
        return CifarResNet(cifar[arch]).to(memory_format=torch.channels_last)
    names = [n for n in torchvision.models.list_models(torchvision.models) if "resn" in n]
    if arch not in names:
        choices = ", ".join([*cifar, *names])
        raise UserError(f"--arch {arch}: no such network; choose one of {choices}")
    encoder = torchvision.models.get_model(arch, weights=None)
    encoder.dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    # Same numbers up to rounding, in the memory layout that tensor cores take.
    return encoder.to(memory_format=torch.channels_last)
