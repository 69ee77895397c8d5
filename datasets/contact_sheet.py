"""Sheets of thumbnails with captions, such as the contact sheet of a subset."""

import itertools
import warnings

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from datasets.source import SPLITS
from utils.files import atomic_write

# pixels
TILE, GAP, TEXT = 96, 24, 22
COLUMNS = 8


def draw_contact_sheet(path, title, packed, record):
    """Write a PNG file with some images of every class and split of <ratio>.json."""
    lines = []
    for split, c in itertools.product(SPLITS, range(len(record["classes"]))):
        rows = np.array(record["splits"][split])
        rows = rows[packed.labels[rows] == c]
        plural = "s" * (len(rows) != 1)
        caption = f"{split}: {record['classes'][c]}, {len(rows)} image{plural}"
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, COLUMNS).astype(int))]
        lines.append((caption, [(row, "") for row in rows]))
    draw_sheet(path, title, lines, np.load(packed.images_path, mmap_mode="r"), packed.sizes)


def draw_sheet(path, title, lines, images, sizes):
    """Write a PNG file with lines of thumbnails, in their true aspect ratio.

    lines: [(caption, [(row of `images`, text of at most two lines, or "")])], at most COLUMNS
    thumbnails each; images uint8 [M, S, S, C]; sizes [M, 2]: true height and width.
    """
    heights = [
        GAP + TILE * bool(tiles) + TEXT * any(text for _, text in tiles) for _, tiles in lines
    ]
    sheet = Image.new("RGB", (COLUMNS * TILE, GAP + sum(heights)), "white")
    figure = Figure(figsize=(sheet.width / 100, sheet.height / 100), dpi=100)

    def write(text, x, y, size):
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        place = x / sheet.width, 1 - y / sheet.height
        figure.text(*place, text, fontsize=size, va="center", parse_math=False)

    write(title, 4, GAP / 2, 8)
    tops = itertools.accumulate(heights, initial=GAP)
    for top, (caption, tiles) in zip(tops, lines, strict=False):
        write(caption, 4, top + GAP / 2, 8)
        for column, (row, text) in enumerate(tiles):
            sides = np.rint((TILE - 4) * sizes[row] / sizes[row].max())
            height, width = map(int, np.maximum(sides, 1))
            pixels = images[row].squeeze(2) if images.shape[3] == 1 else images[row]
            place = column * TILE + (TILE - width) // 2, top + GAP + (TILE - height) // 2
            sheet.paste(Image.fromarray(pixels).resize((width, height)), place)
            write(text, column * TILE + 2, top + GAP + TILE + TEXT / 2, 6)
    figure.figimage(np.asarray(sheet))
    with warnings.catch_warnings(), atomic_write(path) as temporary:
        # a name may have letters that the font lacks
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(temporary, format="png")
