"""Augmented views of a whole batch on the device; every image has its own parameters.

Images are stored squeezed to squares of side S. Crops are drawn in the geometry of the original
image, so its height and width come along. Parameters come from a CPU generator, so CPU and GPU draw
the same. Given the same parameters, every function equals torchvision.transforms.v2.functional on
float images (tests/test_augment.py).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import RandAugment

# The parameters of the published code. area: of RandomResizedCrop; jitter: brightness, contrast,
# saturation and hue of ColorJitter; p_jitter, p_gray, p_flip: probabilities; degrees: of rotation.
RECIPES = {
    "natural": dict(
        area=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1),
        p_jitter=0.8,
        p_gray=0.2,
        p_flip=0.5,
        degrees=0,
    ),
    "medical": dict(
        area=(0.25, 1.0),
        jitter=(0.15, 0.15, 0.0, 0.0),
        p_jitter=0.8,
        p_gray=0.0,
        p_flip=0.5,
        degrees=0,
    ),
    "cardiac": dict(
        area=(0.2, 1.0),
        jitter=(0.5, 0.5, 0.5, 0.0),
        p_jitter=1.0,
        p_gray=0.0,
        p_flip=0.5,
        degrees=45,
    ),
    # the evaluation view
    "none": {},
}

TINY = torch.finfo(torch.float32).tiny


def augment(images, sizes, recipe, size, generator, randaugment=False, shard=slice(None)):
    """Draw one augmented view of each image, float32 [B, C, size, size]; see augment_views."""
    return augment_views(images, sizes, recipe, size, generator, [randaugment], shard)[0]


def augment_views(images, sizes, recipe, size, generator, randaugment, shard=slice(None)):
    """Draw V augmented views of each image.

    images: uint8 [B, C, S, S], squeezed squares; sizes: int [N, 2], height and width of all N
    images of the batch. Parameters are drawn for all N, and `shard` selects the B given images, so
    that ranks that share a batch draw the same. recipe: a key of RECIPES, or parameters as there.
    randaugment: V bools, whether a view gets RandAugment at the end.
    Returns float32 [V, B, C, size, size] in [0, 1].
    """
    p, views = RECIPES[recipe] if isinstance(recipe, str) else recipe, len(randaugment)
    if not p:
        return center_view(images, sizes[shard], size).expand(views, -1, -1, -1, -1)
    drawn, seeds = [], []
    for is_strong in randaugment:
        drawn.append(draw_view(sizes, p, generator))
        seeds.append(int(torch.randint(2**62, (), generator=generator)) if is_strong else None)
    # All views in one call: view-major rows [V * B].
    drawn = {name: torch.cat([view[name][shard] for view in drawn]) for name in drawn[0]}
    boxes, flips, angles = (drawn.pop(name) for name in ("boxes", "flips", "angles"))
    *colors, counts = plan_colors(images.shape[1], **drawn)
    n, sizes = len(sizes), sizes[shard].repeat(views, 1)
    boxes, flips, angles, sizes, *colors = copy_as_one(
        [boxes, flips, angles, sizes, *colors], images
    )
    x = images / 255
    if p["degrees"]:
        # The cardiac order: flip, rotate, jitter the whole image, then crop.
        x = change_colors(rotate(x.repeat(views, 1, 1, 1), sizes, angles, flips), *colors, counts)
        x = crop_resize(x, boxes, sizes, size)
    else:
        x = change_colors(crop_resize(x, boxes, sizes, size, flips, views=views), *colors, counts)
    x = x.unflatten(0, (views, -1))
    for view, seed in enumerate(seeds):
        if seed is not None:
            x[view] = apply_randaugment(x[view], seed, n, shard)
    return x


def draw_view(sizes, p, generator):
    """Draw the parameters of one view of each image; p: as an entry of RECIPES."""
    n = len(sizes)
    boxes = draw_crops(sizes, p["area"], generator)
    flips = torch.rand(n, generator=generator) < p["p_flip"]
    jitter = draw_jitter(n, p["jitter"], p["p_jitter"], generator)
    gray = torch.rand(n, generator=generator) < p["p_gray"]
    angles = torch.rand(n, generator=generator) * 2 - 1 if p["degrees"] else torch.zeros(n)
    return dict(boxes=boxes, flips=flips, gray=gray, angles=angles * p["degrees"], **jitter)


def apply_randaugment(x, seed, n, shard, operations=2, magnitude=10):
    """Apply torchvision's RandAugment image by image, which is slow.

    x [B, C, H, W] in [0, 1]: the images that `shard` selects from a batch of n.
    Source: Cubuk et al. 2020, arXiv:1909.13719.
    """
    transform = RandAugment(num_ops=operations, magnitude=magnitude)
    # torchvision draws from the global generator of the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pixels = (x * 255).round().to(torch.uint8)
        # A single pixel stands for each image of another rank, so that all ranks draw the same.
        images = [pixels[:0].new_zeros(x.shape[1], 1, 1)] * n
        images[shard] = pixels
        return torch.stack([transform(image) for image in images][shard]) / 255


def center_view(images, sizes, size):
    """Return the evaluation view: shorter side to int(1.15 * size), then the centre crop.

    images uint8 [B, C, S, S]; sizes int [B, 2]. Returns float32 [B, C, size, size] in [0, 1].
    """
    return crop_resize(images / 255, center_crops(sizes, size), sizes, size, inside=False)


def to_device(tensor, like):
    return tensor.to(like.device, non_blocking=True)


def copy_as_one(tensors, like):
    """Copy CPU tensors with equally many rows to the device of `like` as one float32 tensor.

    Returns them apart again, with their shapes and types. Integers above 2^24 would be rounded.
    """
    columns = [tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in tensors]
    packed = to_device(torch.cat([column.float() for column in columns], 1), like)
    parts = packed.split([column.shape[1] for column in columns], 1)
    return [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def draw_crops(sizes, area, generator, aspect=(3 / 4, 4 / 3), tries=10):
    """Draw crop boxes with the distribution of torchvision's RandomResizedCrop.get_params.

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
    # Where no try fits, as in very long images: the largest central crop of an allowed aspect.
    ratio = width / height
    largest_w = torch.where(ratio > aspect[1], (height * aspect[1]).round(), width)
    largest_h = torch.where(ratio < aspect[0], (width / aspect[0]).round(), height)
    none = ~fits.any(dim=1, keepdim=True)
    w, h = torch.where(none, largest_w, w), torch.where(none, largest_h, h)
    v = torch.rand(2, len(sizes), 1, generator=generator, dtype=torch.float64)
    top = torch.where(none, ((height - h) / 2).floor(), (v[0] * (height - h + 1)).floor())
    left = torch.where(none, ((width - w) / 2).floor(), (v[1] * (width - w + 1)).floor())
    return torch.cat([top, left, h, w], dim=1).float()


def center_crops(sizes, size, margin=0.15):
    """Return the box that Resize(int(size * (1 + margin))) and CenterCrop(size) keep.

    In pixels of the original image: float [B, 4], top, left, height, width.
    """
    height, width = sizes[:, 0].double(), sizes[:, 1].double()
    short = torch.minimum(height, width)
    resized = int(size + margin * size)  # shorter side after Resize
    new_h, new_w = (resized * height / short).floor(), (resized * width / short).floor()
    top, left = ((new_h - size) / 2).round(), ((new_w - size) / 2).round()
    return torch.stack(
        [top * height / new_h, left * width / new_w, size * height / new_h, size * width / new_w],
        dim=1,
    ).float()


def crop_resize(x, boxes, sizes, size, flips=None, inside=True, views=1):
    """Crop every image to its boxes and resize them, antialiased bilinear, by two matrix products.

    x float [B, C, S, S], squeezed squares; boxes [V * B, 4], `views` crops of each image,
    view-major: top, left, height, width in pixels of the original, whose height and width are
    sizes [V * B, 2]; flips bool [V * B] or None: left-right after the crop. inside: only pixels of
    the box count, as when a crop is cut out first; otherwise pixels around it count, too, as when
    the whole image is resized first. Returns [V * B, C, size, size]. For images that are stored at
    their own size this equals torchvision's resized_crop.
    """
    n, channels, side = x.shape[:3]
    # original -> stored pixels
    boxes = to_device(boxes * side / sizes.repeat(1, 2), x)
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], size, side, inside)  # [V * B, size, S]
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], size, side, inside, flips)
    # The rows of all views in one product, in the layout of the packed file: [B, S, S * C].
    rows = rows.unflatten(0, (views, n)).transpose(0, 1).flatten(1, 2)
    x = (rows @ x.permute(0, 2, 3, 1).flatten(2)).view(n, views, size, side, channels)
    x = x.permute(1, 0, 4, 2, 3).reshape(views * n, channels * size, side)
    return (x @ columns.transpose(1, 2)).unflatten(1, (channels, size))


def _resize_weights(start, length, size, side, inside, flips=None):
    """Return triangle-filter weights [B, size, side] from `side` pixels to `size` samples.

    The samples cover [start, start + length), from its end where `flips` [B] is true.
    """
    step = (length / size)[:, None, None]  # stored pixels per sample
    sample = torch.arange(size, device=start.device)[None, :, None]
    if flips is not None:
        sample = torch.where(to_device(flips, start)[:, None, None], size - 1 - sample, sample)
    centre = start[:, None, None] + (sample + 0.5) * step  # [B, size, 1]
    pixel = torch.arange(side, device=start.device)[None, None, :]
    weights = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    if inside:
        eps = 1e-3  # box edges are floats
        after_start = pixel + 1 > start[:, None, None] + eps
        before_end = pixel < (start + length)[:, None, None] - eps
        weights = weights * (after_start & before_end)
    return weights / weights.sum(dim=2, keepdim=True)


def rotate(x, sizes, degrees, flips):
    """Flip left-right, then rotate counter-clockwise about the centre.

    Nearest pixel, black outside. x float [B, C, S, S]; sizes [B, 2] height and width of the
    original, in whose geometry the angle is measured; degrees [B]; flips bool [B].
    """
    angle = degrees * np.pi / 180
    cos, sin, tall = angle.cos(), angle.sin(), sizes[:, 0] / sizes[:, 1]
    mirror = 1 - 2 * flips.float()
    zero = torch.zeros_like(angle)
    # Source coordinates of each pixel, in units of half a side: [B, 2, 3].
    source_x = torch.stack([mirror * cos, -mirror * sin * tall, zero], 1)
    source_y = torch.stack([sin / tall, cos, zero], 1)
    theta = torch.stack([source_x, source_y], 1)
    grid = F.affine_grid(to_device(theta, x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def draw_jitter(n, strengths, p, generator):
    """Draw the parameters of color_jitter for n images, as ColorJitter(*strengths) does.

    p: probability that an image is changed at all.
    """
    order = torch.rand(n, 4, generator=generator).argsort(dim=1)  # a permutation per image
    u = (torch.rand(4, n, generator=generator) * 2 - 1) * torch.tensor(strengths)[:, None]
    u = u * (torch.rand(n, generator=generator) < p)
    return dict(order=order, brightness=1 + u[0], contrast=1 + u[1], saturation=1 + u[2], hue=u[3])


def color_jitter(x, order, brightness, contrast, saturation, hue):
    """Change brightness, contrast, saturation and hue of every image in its own order.

    x float [B, C, H, W] in [0, 1], C = 1 or 3. On the CPU: order int [B, 4], each row a permutation
    of 0 brightness, 1 contrast, 2 saturation, 3 hue; factors [B], 1 for no change; hue [B] as a
    share of the colour circle, 0 for no change. Equals torchvision's adjust_* functions.
    """
    *colors, counts = plan_colors(x.shape[1], order, brightness, contrast, saturation, hue)
    return change_colors(x, *copy_as_one(colors, x), counts)


def plan_colors(channels, order, brightness, contrast, saturation, hue, gray=None):
    """Group the images by their next operation, at every step of color_jitter, on the CPU.

    gray: bool [B], images whose saturation becomes 0 in a last step. Returns factors [B, 5];
    members int [B, steps], at each step the images in the order of their operations; counts, at
    each step the number of images of each operation of ADJUST.
    """
    hue = hue * (channels == 3)  # one channel has no hue
    kept = torch.ones_like(hue) if gray is None else 1 - gray.float()
    factors = torch.stack([brightness, contrast, saturation, hue, kept], 1)
    order = F.pad(order, (0, int(gray is not None)), value=4)
    is_changed = factors != torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    nothing = len(ADJUST)
    operations = torch.where(is_changed.gather(1, order), order, nothing)
    counts = F.one_hot(operations, nothing + 1).sum(0)[:, :nothing].tolist()
    return factors, operations.argsort(0), counts


def change_colors(x, factors, members, counts):
    """Change x [B, C, H, W] in [0, 1] as plan_colors has planned it, a group at a time."""
    changed = x.clamp(0, 1)
    for step, counts_of_step in enumerate(counts):
        start = 0
        for operation, n in enumerate(counts_of_step):
            if n:
                group = members[start : start + n, step]
                f = factors[group, operation, None, None, None]
                changed.index_copy_(0, group, ADJUST[operation](x.index_select(0, group), f))
                start += n
        x = changed
    return changed


def adjust_brightness(x, factor):
    return (factor * x).clamp_(0, 1)


def adjust_contrast(x, factor):
    mean = grayscale(x).mean(dim=(1, 2, 3), keepdim=True)
    return (factor * x).add_((1 - factor) * mean).clamp_(0, 1)


def adjust_saturation(x, factor):
    return (factor * x).add_((1 - factor) * grayscale(x)).clamp_(0, 1)


def shift_hue(x, shift):
    """Turn the hue of RGB images [B, 3, H, W] in [0, 1] by shift, a share of the colour circle.

    shift [B] or [B, 1, 1, 1].
    """
    r, g, b = x.unbind(1)  # [B, H, W]
    value = r.maximum(g).maximum(b)
    chroma = value - r.minimum(g).minimum(b)
    # The largest channel decides the sector. As factors 0 and 1: torch.where is slow on the CPU.
    not_r, not_g = (value - r).ceil_(), (value - g).ceil_()
    not_r_but_g, not_r_nor_g = not_r * (1 - not_g), not_r * not_g
    sector = (g - b).mul_(1 - not_r).add_((b - r).mul_(not_r_but_g)).add_((r - g).mul_(not_r_nor_g))
    sector = sector.div_(chroma.clamp(min=TINY)).add_(2 * not_r_but_g + 4 * not_r_nor_g)
    offset = torch.arange(5, 0, -2, device=x.device)[:, None, None]
    k = (offset + sector[:, None]).add_(6 * shift.view(-1, 1, 1, 1))
    # k modulo 6; the operator % is slow.
    k.sub_((k / 6).floor_().mul_(6))
    return value[:, None] - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma[:, None])


# Operations of color_jitter, in the order of its numbers; the last one makes images gray.
ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, shift_hue, adjust_saturation)


def grayscale(x):
    """Return the luma (ITU-R 601) of [B, C, H, W] as [B, 1, H, W]."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(0.587 * g).add_(0.114 * b)


def normalize(x, mean, std):
    """Return (x - mean) / std per channel as [B, 3, H, W]; one channel becomes three."""
    mean, std = (
        to_device(torch.tensor(values, dtype=x.dtype), x)[:, None, None] for values in (mean, std)
    )
    x = (x - mean).div_(std)
    return x.expand(-1, 3, -1, -1)
