"""Views of a whole batch of images, on the device: crop and flip in one resampling, then colours, every image by its own parameters.

Images lie squeezed to squares of side S, so that memory has a fixed size; crops are drawn and taken in the geometry of the true
image, whose height and width come along. Parameters come from one CPU generator, so that CPU and GPU draw the same. Given the same
parameters every function here equals torchvision.transforms.v2.functional on float images (tests/test_augment.py).
"""

import numpy as np
import torch
import torch.nn.functional as F

# the reference's numbers; area as in RandomResizedCrop, jitter as in ColorJitter: brightness, contrast, saturation, hue
RECIPES = {
    "natural": dict(
        area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), p_jitter=0.8, p_gray=0.2, degrees=0
    ),
    "medical": dict(
        area=(0.25, 1.0), jitter=(0.15, 0.15, 0.0, 0.0), p_jitter=0.8, p_gray=0.0, degrees=0
    ),
    "cardiac": dict(
        area=(0.2, 1.0), jitter=(0.5, 0.5, 0.5, 0.0), p_jitter=1.0, p_gray=0.0, degrees=45
    ),
}


def augment(images, sizes, recipe, size, generator, strong=False, part=slice(None)):
    """One augmented view of each image, every image with its own parameters; strong: RandAugment on top.

    images uint8 [B, C, S, S] on any device, squeezed squares; sizes int [N, 2], true height and width of the images of the whole batch,
    of which `part` are given: parameters are drawn for all, so that processes which share a batch draw the same;
    generator on the CPU, so that CPU and GPU draw the same. Returns float32 [B, C, size, size] in [0, 1].
    """
    p, n = RECIPES[recipe], len(sizes)
    boxes = draw_crops(sizes, p["area"], generator)[part]
    flips = (torch.rand(n, generator=generator) < 0.5)[part]
    jitter = {
        name: values[part]
        for name, values in draw_jitter(n, p["jitter"], p["p_jitter"], generator).items()
    }
    gray = (torch.rand(n, generator=generator) < p["p_gray"])[part]
    sizes = sizes[part]
    if p["degrees"]:  # cardiac order: flip, rotate, jitter the whole image, then crop
        angles = ((torch.rand(n, generator=generator) * 2 - 1) * p["degrees"])[part]
        x = crop_resize(
            color_jitter(rotate(images / 255, sizes, angles, flips), **jitter), boxes, sizes, size
        )
    else:
        x = color_jitter(crop_resize(images / 255, boxes, sizes, size, flips), **jitter)
    if p["p_gray"]:
        x = torch.where(to_device(gray, x)[:, None, None, None], grayscale(x), x)
    return rand_augment(x, generator, n, part) if strong else x


def rand_augment(x, generator, n, part, operations=2, magnitude=10):
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719) by torchvision, image by image: slow beside the rest.

    x [B, C, H, W] in [0, 1], `part` of a batch of n images.
    """
    from torchvision.transforms.v2 import RandAugment

    transform = RandAugment(num_ops=operations, magnitude=magnitude)
    with torch.random.fork_rng(
        devices=[]
    ):  # torchvision draws from the global generator of the CPU
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        pixels = (x * 255).round().to(torch.uint8)
        images = [
            pixels[:0].new_zeros(x.shape[1], 1, 1)
        ] * n  # of the others a single pixel is transformed: as many numbers are drawn
        images[part] = pixels
        return torch.stack([transform(image) for image in images][part]) / 255


def center_view(images, sizes, size):
    """The evaluation view: shorter side to int(1.15 * size), then the centre crop. Returns float32 [B, C, size, size] in [0, 1]."""
    return crop_resize(images / 255, center_crops(sizes, size), sizes, size, inside=False)


def to_device(tensor, like):
    return tensor.to(like.device, non_blocking=True)


def draw_crops(sizes, area, generator, aspect=(3 / 4, 4 / 3), tries=10):
    """Crop boxes distributed as in torchvision's RandomResizedCrop.get_params, for a whole batch.

    sizes int [B, 2] height and width in pixels; area: range of the crop's share of the image.
    Returns float [B, 4]: top, left, height, width in pixels (whole numbers).
    """
    height, width = sizes[:, :1].double(), sizes[:, 1:].double()  # [B, 1]
    u = torch.rand(2, len(sizes), tries, generator=generator, dtype=torch.float64)
    target = height * width * (area[0] + (area[1] - area[0]) * u[0])  # [B, tries] pixels
    log_aspect = np.log(aspect[0]) + np.log(aspect[1] / aspect[0]) * u[1]
    w, h = (target * log_aspect.exp()).sqrt().round(), (target / log_aspect.exp()).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)  # the first try that fits
    w, h = w.gather(1, first), h.gather(1, first)
    # none of the tries fits (very long images): the largest central crop of an allowed aspect ratio
    ratio = width / height
    whole_w = torch.where(ratio > aspect[1], (height * aspect[1]).round(), width)
    whole_h = torch.where(ratio < aspect[0], (width / aspect[0]).round(), height)
    none = ~fits.any(dim=1, keepdim=True)
    w, h = torch.where(none, whole_w, w), torch.where(none, whole_h, h)
    v = torch.rand(2, len(sizes), 1, generator=generator, dtype=torch.float64)
    top = torch.where(none, ((height - h) / 2).floor(), (v[0] * (height - h + 1)).floor())
    left = torch.where(none, ((width - w) / 2).floor(), (v[1] * (width - w + 1)).floor())
    return torch.cat([top, left, h, w], dim=1).float()


def center_crops(sizes, size, margin=0.15):
    """The box, in pixels of the true image, that Resize(int(size * (1 + margin))) and CenterCrop(size) keep. Returns float [B, 4]."""
    height, width = sizes[:, 0].double(), sizes[:, 1].double()
    short = torch.minimum(height, width)
    resized = int(size + margin * size)  # shorter side after Resize
    new_h, new_w = (resized * height / short).floor(), (resized * width / short).floor()
    top, left = ((new_h - size) / 2).round(), ((new_w - size) / 2).round()
    return torch.stack(
        [top * height / new_h, left * width / new_w, size * height / new_h, size * width / new_w],
        dim=1,
    ).float()


def crop_resize(x, boxes, sizes, size, flips=None, inside=True):
    """Crop every image to its own box and resize it, antialiased bilinear, as two small matrix products per image.

    x float [B, C, S, S], squeezed squares of images of true `sizes` [B, 2]; boxes [B, 4] top, left, height, width in pixels
    of the true image; flips bool [B] or None, left-right after the crop. inside: only pixels of the box count, as when a
    crop is cut out first; else pixels around it reach in, as when the whole image is resized first.
    Returns [B, C, size, size]. For images stored at their true size this is torchvision's resized_crop.
    """
    side = x.shape[-1]
    boxes = to_device(boxes * side / sizes.repeat(1, 2), x)  # true -> stored pixels
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], size, side, inside)  # [B, size, S]
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], size, side, inside)
    if flips is not None:
        columns = torch.where(to_device(flips, x)[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ x @ columns[:, None].transpose(2, 3)


def _resize_weights(start, length, size, side, inside):
    """Triangle-filter weights [B, size, side] that map `side` pixels to `size` samples of [start, start + length)."""
    step = (length / size)[:, None, None]  # stored pixels per sample
    centre = (
        start[:, None, None] + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * step
    )  # [B, size, 1]
    pixel = torch.arange(side, device=start.device)[None, None, :]
    weights = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    if inside:
        eps = 1e-3  # box edges are floats
        weights = weights * (
            (pixel + 1 > start[:, None, None] + eps)
            & (pixel < (start + length)[:, None, None] - eps)
        )
    return weights / weights.sum(dim=2, keepdim=True)


def rotate(x, sizes, degrees, flips):
    """Flip left-right where asked, then rotate counter-clockwise about the centre: nearest pixel, black outside.

    x float [B, C, S, S]; sizes [B, 2] true height and width, the geometry in which the angle is meant; degrees [B]; flips bool [B].
    """
    angle = degrees * np.pi / 180
    cos, sin, tall = angle.cos(), angle.sin(), sizes[:, 0] / sizes[:, 1]
    mirror = 1 - 2 * flips.float()
    zero = torch.zeros_like(angle)
    theta = torch.stack(
        [
            torch.stack(
                [mirror * cos, -mirror * sin * tall, zero], 1
            ),  # where each pixel comes from,
            torch.stack([sin / tall, cos, zero], 1),
        ],
        1,
    )  # in units of half a side
    grid = F.affine_grid(to_device(theta, x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def draw_jitter(n, strengths, p, generator):
    """Parameters of color_jitter for n images, as ColorJitter(*strengths) with probability p draws them."""
    order = torch.rand(n, 4, generator=generator).argsort(dim=1)  # a permutation per image
    u = (torch.rand(4, n, generator=generator) * 2 - 1) * torch.tensor(strengths)[:, None]
    u = u * (torch.rand(n, generator=generator) < p)
    return dict(order=order, brightness=1 + u[0], contrast=1 + u[1], saturation=1 + u[2], hue=u[3])


def color_jitter(x, order, brightness, contrast, saturation, hue):
    """Brightness, contrast, saturation and hue of every image by its own factors, in its own order.

    x float [B, C, H, W] in [0, 1], C = 1 or 3; order int [B, 4], each row a permutation of 0 brightness, 1 contrast, 2 saturation,
    3 hue; factors [B] (1 leaves as is), hue [B] as a share of the colour circle (0 leaves as is); all on the CPU.
    Equal to torchvision's adjust_* functions on float images.
    """
    factors = torch.stack([brightness, contrast, saturation, torch.ones_like(hue)], 1).gather(
        1, order
    )  # [B, 4], in order
    for step in range(4):
        which = order[:, step, None, None, None]
        f, is_contrast, is_saturation = (
            to_device(t, x) for t in (factors[:, step, None, None, None], which == 1, which == 2)
        )
        gray = grayscale(x)
        towards = (
            gray.mean(dim=(1, 2, 3), keepdim=True) * is_contrast + gray * is_saturation
        )  # black for brightness
        x = (
            (f * x).add_((1 - f) * towards).clamp_(0, 1)
        )  # the first makes a new x: what came in stays
        shifted = ((order[:, step] == 3) & (hue != 0)).nonzero().squeeze(1)
        if x.shape[1] == 3 and len(shifted):
            rows = to_device(shifted, x)
            x.index_copy_(0, rows, shift_hue(x[rows], to_device(hue[shifted], x)))
    return x


def grayscale(x):
    """Luma (ITU-R 601) of [B, C, H, W] as [B, 1, H, W]."""
    return (
        x
        if x.shape[1] == 1
        else (
            x * to_device(torch.tensor([0.2989, 0.587, 0.114], dtype=x.dtype), x)[:, None, None]
        ).sum(1, keepdim=True)
    )


def shift_hue(x, shift):
    """Turn the hue of RGB images [B, 3, H, W] by shift [B] (1 = once around), through HSV."""
    r, g, b = x.unbind(1)  # [B, H, W]
    value = r.maximum(g).maximum(b)
    chroma = value - r.minimum(g).minimum(b)
    c = torch.where(chroma == 0, 1, chroma)
    sector = torch.where(
        value == r, (g - b) / c, torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)
    )
    k = (
        to_device(torch.tensor([5.0, 3.0, 1.0]), x)[:, None, None]
        + sector[:, None]
        + 6 * shift[:, None, None, None]
    ) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def normalize(x, mean, std):
    """(x - mean) / std per channel; one channel becomes three, as the network expects. Returns [B, 3, H, W]."""
    mean, std = (
        to_device(torch.tensor(values, dtype=x.dtype), x)[:, None, None] for values in (mean, std)
    )
    x = (x - mean) / std
    return x.expand(-1, 3, -1, -1)
