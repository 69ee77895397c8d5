"""A picture of a subset: some images of every class and split."""

import warnings

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from datasets.source import SPLITS
from utils.files import atomic_write

# pixels
TILE, GAP = 96, 24
COLUMNS = 8


def draw_contact_sheet(path, title, packed, record):
    """Write a PNG file with some images of <ratio>.json, in their true aspect ratio."""
    images = np.load(packed.images_path, mmap_mode="r")
    sheet = Image.new("RGB", (COLUMNS * TILE, 6 * (TILE + GAP) + GAP), "white")
    figure = Figure(figsize=(sheet.width / 100, sheet.height / 100), dpi=100)
    texts = [(title, 0)]
    for line, (split, c) in enumerate((split, c) for split in SPLITS for c in (0, 1)):
        rows, top = np.array(record["splits"][split]), GAP + line * (TILE + GAP)
        rows = rows[packed.labels[rows] == c]
        plural = "s" * (len(rows) != 1)
        texts.append((f"{split}: {record['classes'][c]}, {len(rows)} image{plural}", top))
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, COLUMNS).astype(int))]
        for column, row in enumerate(rows):
            sides = np.rint((TILE - 4) * packed.sizes[row] / packed.sizes[row].max())
            height, width = map(int, np.maximum(sides, 1))
            pixels = images[row].squeeze(2) if images.shape[3] == 1 else images[row]
            place = column * TILE + (TILE - width) // 2, top + GAP + (TILE - height) // 2
            sheet.paste(Image.fromarray(pixels).resize((width, height)), place)
    figure.figimage(np.asarray(sheet))
    for text, top in texts:
        y = 1 - (top + GAP / 2) / sheet.height
        figure.text(4 / sheet.width, y, text, fontsize=8, va="center", parse_math=False)
    with warnings.catch_warnings(), atomic_write(path) as temporary:
        # a class name may have letters that the font lacks
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(temporary, format="png")
