"""Classify a folder of new images: what --predict does."""

import csv

import torch
from tqdm import tqdm

from datasets.augment import center_view, normalize
from datasets.images import IMAGE_SUFFIXES, list_images, printable, read_image, squeeze
from utils.cli import UserError
from utils.files import atomic_write


def list_prediction_images(folder, csv_path):
    """List the images of --predict before any long work; [] without --predict.

    Raises UserError where --predict or --csv stands alone, or where there is no image.
    """
    if (folder is None) != (csv_path is None):
        raise UserError("--predict FOLDER and --csv FILE need each other; give both or none")
    images = list_images(folder) if folder else []
    if folder and not images:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError(f"--predict {folder}: no such folder, or no image in it ({suffixes})")
    return images


def predict_folder(network, subset, folder, files, csv_path, device):
    """Write file, probability of the minority class and predicted class of every image.

    network: [B, 3, H, W] -> logits [B, 2]. files: from list_prediction_images(folder). Images are
    prepared like those of the subset. An unreadable image has empty cells; when all others are
    written, a UserError names the first one.
    """
    channels, unreadable = subset.images.shape[3], []
    network.eval()
    with (
        atomic_write(csv_path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(["file", f"p_{subset.classes[subset.minority]}", "predicted"])
        for path in tqdm(files, desc="predict", leave=False, disable=None):
            name = printable(path.relative_to(folder))
            try:
                pixels = read_image(path, grayscale=channels == 1)
            except Exception as error:
                # Pillow raises many kinds of exceptions for a damaged file.
                reason = " ".join(str(error).split())
                unreadable.append(f"{printable(path)}: cannot be read as an image ({reason})")
                table.writerow([name, "", ""])
                continue
            p = predict_image(network, subset, pixels, device)
            label = subset.classes[int(p[1] > 0.5)]
            table.writerow([name, f"{p[subset.minority]:.6f}", label])
    print(f"wrote {csv_path}: {len(files) - len(unreadable)} images")
    if unreadable:
        others = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise UserError(f"{unreadable[0]}{others}; its cells in {csv_path} are empty")


@torch.no_grad()
def predict_image(network, subset, pixels, device):
    """Return the probabilities [2] of one image, uint8 [H, W, C]."""
    square = squeeze(pixels, subset.images.shape[1])
    image = torch.from_numpy(square.copy()).permute(2, 0, 1)[None].to(device)
    view = center_view(image, torch.tensor([pixels.shape[:2]]), subset.size)
    return network(normalize(view, subset.mean, subset.std)).double().softmax(1)[0].cpu()
