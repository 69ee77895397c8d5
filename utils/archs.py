"""Names of networks. Needs no torch: the reports read old runs by them."""

# {name: depth}; torchvision has none of them
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56)}
