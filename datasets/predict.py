"""Classify new images: what --predict and --export do."""

import copy
import json
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from datasets.augment import center_view, normalize
from datasets.images import IMAGE_SUFFIXES, list_images, printable, read_image, squeeze
from utils.cli import UserError
from utils.files import atomic_write, write_table


class ImageClassifier(nn.Module):
    """A trained network with all it needs to classify an image; torch.export takes it whole.

    network: normalised [B, 3, size, size] -> logits [B, C]. settings: what the JSON file of the
    classifier holds (baselines/classification.py), such as classes, threshold, size and mean.
    """

    def __init__(self, network, settings):
        super().__init__()
        self.network, self.settings = network, settings

    def forward(self, images, sizes):
        """Return the class probabilities, float64 [B, C].

        images: uint8 [B, channels, stored_size, stored_size], squeezed to squares; sizes: int
        [B, 2], their height and width before.
        """
        view = center_view(images, sizes, self.settings["size"])
        x = normalize(view, self.settings["mean"], self.settings["std"])
        return self.network(x).double().softmax(1)


# A finished classifier is used as it is unless other flags are typed.
REUSE_FLAGS = {"--predict", "--csv", "--export", "--device", "--out"}


def add_prediction_flags(add):
    text = "classify the images in FOLDER; a finished classifier is used as it is"
    add("--predict", type=Path, metavar="FOLDER", help=text)
    add("--csv", type=Path, metavar="OUT", help="table of --predict")
    text = "save the classifier for use without the kit, as model.pt2 (torch.export)"
    add("--export", type=Path, metavar="FILE", help=text)


def list_prediction_images(args):
    """Check --predict, --csv and --export before any long work; list the images to classify.

    Returns [] without --predict. Raises UserError where a flag lacks its partner, its images or
    its suffix.
    """
    if (args.predict is None) != (args.csv is None):
        raise UserError("--predict FOLDER and --csv FILE need each other; give both or none")
    if args.export and args.export.suffix != ".pt2":
        raise UserError(f"--export {args.export}: give a file name that ends in .pt2")
    images = list_images(args.predict) if args.predict else []
    if args.predict and not images:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError(f"--predict {args.predict}: no such folder, or no image in it ({suffixes})")
    return images


def predict_folder(classifier, folder, files, csv_path, device):
    """Write file, probability of the minority class, predicted class and threshold of each image.

    files: from list_prediction_images. The minority class is predicted from the threshold up. Of
    more than two classes, each has a column, the likeliest is predicted, and the threshold is
    empty. An unreadable image has empty cells; when all others are written, a UserError names the
    first one.
    """
    settings, unreadable = classifier.settings, []
    classes, minority = settings["classes"], settings["minority"]
    is_binary = len(classes) == 2
    shown = [minority] if is_binary else list(range(len(classes)))
    columns = ["file", *(f"p_{classes[c]}" for c in shown), "predicted", "threshold"]
    classifier.to(device).eval()

    def predict_files():
        for path in tqdm(files, desc="predict", leave=False, disable=None):
            name = printable(path.relative_to(folder))
            try:
                pixels = read_image(path, grayscale=settings["channels"] == 1)
            except Exception as error:
                # Pillow raises many kinds of exceptions for a damaged file.
                reason = " ".join(str(error).split())
                unreadable.append(f"{printable(path)}: cannot be read as an image ({reason})")
                yield name, *[""] * (len(columns) - 1)
                continue
            p = predict_image(classifier, pixels, device)
            label = int(p.argmax())
            if is_binary:
                label = minority if p[minority] >= settings["threshold"] else 1 - minority
            threshold = settings["threshold"] if is_binary else ""
            yield name, *p[shown].tolist(), classes[label], threshold

    write_table(csv_path, columns, predict_files())
    print(f"wrote {csv_path}: {len(files) - len(unreadable)} images")
    if unreadable:
        others = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{others}; its cells in {csv_path} are empty")


def use_classifier(classifier, args, device):
    """Do what --export and --predict ask of an ImageClassifier."""
    if args.export:
        export_classifier(classifier, args.export)
    if args.predict:
        predict_folder(classifier, args.predict, args.new_images, args.csv, device)


@torch.no_grad()
def predict_image(classifier, pixels, device):
    """Return the class probabilities [2] of one image, uint8 [H, W, C]."""
    square = squeeze(pixels, classifier.settings["stored_size"])
    image = torch.from_numpy(square.copy()).permute(2, 0, 1)[None].to(device)
    return classifier(image, torch.tensor([pixels.shape[:2]]))[0].cpu()


def export_classifier(classifier, path):
    """Save the classifier for use without the kit: a torch.export program for the CPU.

    Its batch size is free. The file holds the settings of the classifier as metadata.json.
    """
    settings = classifier.settings
    side, batch = settings["stored_size"], torch.export.Dim("batch")
    images = torch.zeros(2, settings["channels"], side, side, dtype=torch.uint8)
    # torch.export.save warns about weights in the layout channels_last.
    network = copy.deepcopy(classifier).cpu().to(memory_format=torch.contiguous_format)
    program = torch.export.export(
        network.eval().requires_grad_(False),
        (images, torch.full((2, 2), side)),
        dynamic_shapes=({0: batch}, {0: batch}),
    )
    with atomic_write(path) as temporary:
        metadata = {"metadata.json": json.dumps(settings)}
        torch.export.save(program, temporary, extra_files=metadata)
    print(f"wrote {path}; docs/protocols.md shows how to load it")
