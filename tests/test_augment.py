"""Augmentation equals torchvision, parameter by parameter; crops have its distribution."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import evaluate_metrics
import finetune
import pretrain
from common import (
    RECIPES,
    augment,
    augment_views,
    center_crops,
    center_view,
    color_jitter,
    crop_resize,
    draw_crops,
    draw_jitter,
    grayscale,
    load_run,
    normalize,
    rotate,
    shift_hue,
)
from datasets.images import squeeze
from utils.cli import UserError
from utils.runs import make_generator


def photos(n=6, height=48, width=48, channels=3):
    """Smooth random pictures with some contrast, uint8 [n, C, H, W]."""
    x = torch.rand(n, channels, height // 6, width // 6, generator=make_generator(height, width))
    return (tv.resize(x, [height, width], antialias=True) * 255).round().to(torch.uint8)


def sizes_of(images):
    return torch.tensor([images.shape[-2:]]).expand(len(images), 2)


@pytest.mark.parametrize("size", [20, 48, 70])  # smaller, equal and larger than the crops
def test_crop_flip_resize_equals_torchvision(size):
    images = photos()
    boxes = draw_crops(sizes_of(images), (0.2, 1.0), make_generator(0))
    flips = torch.tensor([True, False] * 3)
    ours = crop_resize(images / 255, boxes, sizes_of(images), size, flips)
    for image, box, flip, view in zip(images, boxes.int().tolist(), flips, ours, strict=True):
        theirs = tv.resized_crop(image / 255, *box, [size, size], antialias=True)
        theirs = tv.horizontal_flip(theirs) if flip else theirs
        assert (view - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("height, width", [(48, 48), (60, 90), (120, 48)])
def test_center_view_equals_resize_and_center_crop(height, width):
    images = photos(3, height, width)
    squares = torch.stack(
        [
            torch.from_numpy(squeeze(i.permute(1, 2, 0).numpy(), 48).copy()).permute(2, 0, 1)
            for i in images
        ]
    )
    ours = center_view(squares, sizes_of(images), 32)
    theirs = v2.Compose([v2.Resize(int(32 * 1.15), antialias=True), v2.CenterCrop(32)])(
        images / 255
    )
    difference = (ours - theirs).abs()
    if height == width:  # stored as it is: exact
        assert difference.max() < 1e-4
    else:  # squeezed to a square in between: resampled twice
        assert difference.mean() < 2.5 / 255 and difference.max() < 0.15


def test_photographs_that_are_not_square_lose_little_by_being_squeezed():
    """Two photographs of 427 x 640, stored at 320 x 320 and seen at 224, against torchvision."""
    differences = []
    for photo in load_sample_images().images:
        square = torch.from_numpy(squeeze(photo, 320).copy()).permute(2, 0, 1)[None] / 255
        photo = torch.from_numpy(photo.copy()).permute(2, 0, 1) / 255
        size = torch.tensor([photo.shape[1:]])
        views = [
            (
                crop_resize(square, box[None], size, 224),
                tv.resized_crop(photo, *box.int().tolist(), [224, 224], antialias=True),
            )
            for box in draw_crops(size.expand(12, 2), (0.2, 1.0), make_generator(1))
        ]
        views.append(
            (
                crop_resize(square, center_crops(size, 224), size, 224, inside=False),
                v2.CenterCrop(224)(v2.Resize(257, antialias=True)(photo)),
            )
        )
        # A shift by two pixels would differ more.
        shifted = [(ours[0, :, 2:] - theirs[:, :-2]).abs().mean() for ours, theirs in views]
        differences += [(ours[0] - theirs).abs().mean() for ours, theirs in views]
        latest = differences[-len(views) :]
        assert all(d < s for d, s in zip(latest, shifted, strict=True))
    mean, worst = 255 * np.mean(differences), 255 * max(differences)
    print(f"mean difference {mean:.2f} of 255, worst view {worst:.2f}")
    assert max(differences) < 10 / 255


@pytest.mark.parametrize("height, width", [(100, 100), (80, 200), (30, 300)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    n, area = 3000, (0.2, 1.0)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(8, area), [image]) for _ in range(n)]
    )
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    ours = draw_crops(torch.tensor([[height, width]]).expand(n, 2), area, make_generator(0)).numpy()
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, name
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    wrong = draw_crops(
        torch.tensor([[height, width]]).expand(n, 2), (0.25, 1.0), make_generator(0)
    ).numpy()
    if height == width:  # the test can tell 0.2 from 0.25
        assert ks_2samp(wrong[:, 2] * wrong[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue < 1e-3


def test_color_jitter_equals_torchvision():
    x = photos(24) / 255
    p = draw_jitter(24, (0.4, 0.4, 0.4, 0.1), 1.0, make_generator(0))
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    ours = color_jitter(x, **p)
    assert len({tuple(order.tolist()) for order in p["order"]}) > 5  # every image in its own order
    for i in range(len(x)):
        theirs = x[i]
        for which in p["order"][i].tolist():
            theirs = operations[which](
                theirs, [p["brightness"], p["contrast"], p["saturation"], p["hue"]][which][i].item()
            )
        assert (ours[i] - theirs).abs().max() < 1e-4


def test_jitter_parameters_lie_in_their_ranges_and_leave_a_fifth_alone():
    p = draw_jitter(5000, (0.4, 0.3, 0.2, 0.1), 0.8, make_generator(0))
    for name, strength, neutral in (
        ("brightness", 0.4, 1),
        ("contrast", 0.3, 1),
        ("saturation", 0.2, 1),
        ("hue", 0.1, 0),
    ):
        off = (p[name] - neutral).abs()
        assert off.max() <= strength and off[off > 0].mean() == pytest.approx(
            strength / 2, rel=0.05
        )
        assert (off == 0).float().mean() == pytest.approx(0.2, abs=0.02)
    counts = np.unique(p["order"].numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 140  # 208 expected of each


def test_hue_and_gray_equal_torchvision_also_on_gray_pixels():
    x = photos(3) / 255
    x[0] = 0.5
    x[1, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    for shift in (-0.5, -0.1, 0.0, 0.3):
        assert (shift_hue(x, torch.full((3,), shift)) - tv.adjust_hue(x, shift)).abs().max() < 1e-4
    assert (grayscale(x) - tv.rgb_to_grayscale(x)).abs().max() < 1e-4


def test_rotation_equals_torchvision():
    x = photos(5) / 255
    angles, flips = (
        torch.tensor([0.0, 30.0, -44.0, 10.0, 90.0]),
        torch.tensor([False, False, True, True, False]),
    )
    ours = rotate(x, sizes_of(x), angles, flips)
    for i in range(5):
        theirs = tv.rotate(tv.horizontal_flip(x[i]) if flips[i] else x[i], angles[i].item())
        assert (
            ours[i] - theirs
        ).abs().max() < 1e-4  # no angle here puts a pixel on a tie between two neighbours


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {"none"}))
@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_their_shape_range_and_seed(recipe, channels):
    images = photos(16, channels=channels)
    view = augment(images, sizes_of(images), recipe, 24, make_generator(0))
    assert view.shape == (16, channels, 24, 24) and view.min() >= 0 and view.max() <= 1 + 1e-5
    assert torch.equal(view, augment(images, sizes_of(images), recipe, 24, make_generator(0)))
    assert not torch.equal(view, augment(images, sizes_of(images), recipe, 24, make_generator(1)))
    same = augment(
        images[:1].expand(16, -1, -1, -1), sizes_of(images), recipe, 24, make_generator(0)
    )
    assert len(torch.unique(same.flatten(1), dim=0)) == 16  # every image draws its own parameters
    assert normalize(view, [0.5] * channels, [0.2] * channels).shape == (16, 3, 24, 24)


@pytest.mark.parametrize("recipe", ["natural", "cardiac"])
def test_without_flips_only_the_flipped_views_change(recipe):
    images = photos(16)
    sizes, unflipped = sizes_of(images), {**RECIPES[recipe], "p_flip": 0.0}
    flipped, plain = (augment(images, sizes, p, 24, make_generator(0)) for p in (recipe, unflipped))
    n_equal = sum(map(torch.equal, flipped, plain))
    assert 2 < n_equal < 14
    if recipe == "natural":
        pairs = zip(flipped, plain, strict=True)
        mirrored = [torch.allclose(a.flip(-1), b, atol=1e-4) for a, b in pairs]
        assert n_equal + sum(mirrored) == 16


def test_recipe_none_is_the_evaluation_view_and_draws_nothing():
    images, generator = photos(4), make_generator(0)
    state = generator.get_state()
    view = augment(images[1:3], sizes_of(images), "none", 24, generator, shard=slice(1, 3))
    assert torch.equal(view, center_view(images, sizes_of(images), 24)[1:3])
    assert torch.equal(state, generator.get_state())


def test_natural_view_equals_the_usual_pipeline_on_8_bit_pictures():
    """The whole chain on uint8 PIL pictures, as most code runs it, differs by rounding alone."""
    image = photos(1, 64, 64)
    pil = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    box, p = (
        draw_crops(torch.tensor([[64, 64]]), (0.2, 1.0), make_generator(5)),
        draw_jitter(1, (0.4, 0.4, 0.4, 0.0), 1.0, make_generator(6)),
    )
    ours = crop_resize(image / 255, box, torch.tensor([[64, 64]]), 32)
    theirs = tv.resized_crop(pil, *box[0].int().tolist(), [32, 32], antialias=True)
    assert (ours[0] - tv.to_image(theirs) / 255).abs().max() <= 1.01 / 255
    ours = color_jitter(ours, **p)[0]
    for which in p["order"][0].tolist():
        if which < 3:
            theirs = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[which](
                theirs, [p["brightness"], p["contrast"], p["saturation"]][which].item()
            )
    difference = (ours - tv.to_image(theirs) / 255).abs()
    assert (
        difference.mean() < 2 / 255 and difference.max() < 4 / 255
    )  # three more 8-bit steps that round down


def test_center_crops_keep_the_reference_numbers():
    box = center_crops(torch.tensor([[224, 224]]), 224)  # 224 -> 257, then the middle 224
    assert box[0].tolist() == pytest.approx(
        [16 * 224 / 257, 16 * 224 / 257, 224 * 224 / 257, 224 * 224 / 257], rel=1e-6
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_views_add_randaugment_and_leave_the_global_generator_alone(channels):
    images = torch.randint(
        256, (6, channels, 24, 24), generator=make_generator(0), dtype=torch.uint8
    )
    sizes = torch.full((6, 2), 24)
    before = torch.get_rng_state()
    plain, strong, again = (
        augment(images, sizes, "natural", 16, make_generator(1), strong)
        for strong in (False, True, True)
    )
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(strong, again)
    assert strong.shape == plain.shape and strong.dtype == plain.dtype
    assert 0 <= strong.min() and strong.max() <= 1
    # Two operations for each image; one of them can be the identity.
    pairs = zip(plain, strong, strict=True)
    assert sum(not torch.allclose(a, b, atol=1 / 255) for a, b in pairs) >= 4
    assert not torch.equal(strong, augment(images, sizes, "natural", 16, make_generator(2), True))


@pytest.mark.parametrize(
    "recipe, strong", [("natural", False), ("natural", True), ("cardiac", False)]
)
def test_parts_of_a_batch_are_seen_as_in_the_whole(recipe, strong):
    """As processes that share a batch see it: every third image, and parameters of all."""
    images, sizes = photos(8, 24, 24), torch.randint(20, 60, (8, 2), generator=make_generator(0))
    generator = make_generator(1)
    whole = augment(images, sizes, recipe, 16, generator, strong)
    for first in range(3):
        part, other = slice(first, None, 3), make_generator(1)
        view = augment(images[part], sizes, recipe, 16, other, strong, part)
        torch.testing.assert_close(
            view, whole[part], atol=1.01 / 255 if strong else 1e-5, rtol=0
        )  # RandAugment rounds to 8 bit
        assert torch.equal(other.get_state(), generator.get_state())


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_made_together_are_those_made_one_by_one(recipe):
    """In the layout of the packed file, too; to the last bit."""
    images, sizes = photos(8, 24, 24), torch.randint(20, 60, (8, 2), generator=make_generator(0))
    one_by_one, together = make_generator(1), make_generator(1)
    expected = torch.stack(
        [augment(images, sizes, recipe, 16, one_by_one, strong) for strong in (False, True, False)]
    )
    packed = images.contiguous(memory_format=torch.channels_last)
    views = augment_views(packed, sizes, recipe, 16, together, [False, True, False])
    assert torch.equal(views, expected)
    assert torch.equal(together.get_state(), one_by_one.get_state())


# --------------------------------------------------------------------------------------------------
# the flags --recipe and --no-flip
# --------------------------------------------------------------------------------------------------

SMOKE = ("--smoke", "--arch", "resnet8", "--size", 8, "--device", "cpu", "--out")


@pytest.mark.parametrize("recipe", ["natural", "cardiac"])
def test_the_parameters_of_all_views_go_to_the_device_in_one_copy(recipe):
    class CopyCounter(TorchDispatchMode):
        copied = ()

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            if operator is torch.ops.aten._to_copy.default and args[0].device != out.device:
                self.copied += (args[0].device.type, out.shape[0])
            return out

    # "meta" stands for a GPU: operations between it and the CPU fail
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    sizes = torch.full((8, 2), 32)
    with CopyCounter() as counter:
        views = augment_views(images, sizes, recipe, 24, make_generator(0), [False, False])
    assert views.is_meta and counter.copied == ("cpu", 16)


def test_no_flip_is_recorded_and_inherited(workplace):
    call(pretrain, "subsets/digits/99-1.json", "--no-flip", *SMOKE, "unflipped")
    call(pretrain, "subsets/digits/99-1.json", *SMOKE, "flipped")
    config, subset, _ = load_run("unflipped")
    assert config["no_flip"] is True and subset.augmentation()["p_flip"] == 0
    config, subset, _ = load_run("flipped")
    assert "no_flip" not in config and subset.augmentation() == RECIPES["medical"]
    call(finetune, "unflipped", "--smoke", "--train", "head")
    assert json.loads(Path("unflipped/finetune/config.json").read_text())["no_flip"] is True


def test_recipe_none_is_for_classifiers(workplace):
    subset = "subsets/digits/99-1.json"
    with pytest.raises(UserError, match="--recipe none: contrastive training needs augmentation"):
        call(pretrain, subset, "--recipe", "none", *SMOKE, "refused")
    call(finetune, subset, "--recipe", "none", *SMOKE, "none")
    call(finetune, subset, "--no-augment", *SMOKE, "no-augment")
    configs = [json.loads(Path(run, "config.json").read_text()) for run in ("none", "no-augment")]
    assert [config["recipe"] for config in configs] == ["none", "medical"]
    none, plain = (torch.load(Path(run, "encoder.pt")) for run in ("none", "no-augment"))
    assert all(torch.equal(none[name], plain[name]) for name in none)
    call(evaluate_metrics, "none", "--picture", "none")
    # views of the subset's recipe differ
    assert min(json.loads(Path("none/metrics.json").read_text())["sad"]) > 0
