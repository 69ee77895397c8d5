"""Pictures inside the HTML report: charts as SVG, images and thumbnails as data URIs."""

import base64
import csv
import io
import re

import matplotlib
import numpy as np
from PIL import Image

from reporting.styles import INK, PAPER, RC

# Pixels.
THUMBNAIL, SHEET_WIDTH, HARD_WIDTH = 48, 900, 1400
# A sprite of 1,000 photographs takes about 1.5 MB, of noise twice as much.
MAX_THUMBNAILS = 1000
MAP_SIDE = 640


def svg_markup(figure, title):
    """Return a figure as inline SVG that takes its ink and paper from the page's theme."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(RC):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = svg.replace(INK.lower(), "currentColor").replace(PAPER.lower(), "var(--paper)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def data_uri(image, quality=80):
    """Return a picture as a JPEG in a data URI."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def shrunk_uri(path, width):
    """Return a PNG file as a data URI, at most `width` pixels wide; None where there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        image = image.convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    return data_uri(image)


def map_points(run_folder, subset_path, subset):
    """Return the points of embedding.npz, with a sprite of thumbnails where the images are there.

    Returns None without embedding.npz, else a dict: points (x, y in pixels, is_minority, file,
    place in the sprite or None), sprite (data URI or None), columns of the sprite, method, and
    missing, which says why there are no thumbnails.
    """
    path = run_folder / "embedding.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    xy, is_minority = arrays["xy"], arrays["labels"] == arrays["minority"]
    entries, missing = test_entries(arrays, subset_path, subset)
    files, thumbnails = [""] * len(xy), []
    if entries:
        files = [entry["source"] for entry in entries]
        thumbnails = read_images(subset_path.parent, entries, choose(is_minority))
    places = {point: place for place, (point, _) in enumerate(thumbnails)}
    pixels = to_pixels(xy, float(arrays["limit"]))
    columns = max(1, int(np.ceil(np.sqrt(len(thumbnails)))))
    points = [
        (round(float(x), 1), round(float(y), 1), bool(rare), name, places.get(i))
        for i, ((x, y), rare, name) in enumerate(zip(pixels, is_minority, files, strict=True))
    ]
    # The minority is drawn last, on top.
    points.sort(key=lambda point: point[2])
    sprite = make_sprite([image for _, image in thumbnails], columns) if thumbnails else None
    shown = dict(points=points, sprite=sprite, columns=columns, count=len(thumbnails))
    return dict(**shown, method=str(arrays["map"]), missing=missing)


def test_entries(arrays, subset_path, subset):
    """Return (entries of index.csv of the points, None), or (None, why they are not known)."""
    if not subset:
        return None, "the subset is not beside the run"
    if not (subset_path.parent / "images.npy").is_file():
        return None, "images.npy of the subset is not there"
    rows = np.array(subset["splits"]["test"])
    images = arrays.get("images", np.arange(len(rows)))
    if len(images) != len(arrays["xy"]) or images.max(initial=0) >= len(rows):
        return None, "embedding.npz does not say which image each point is; measure again"
    with open(subset_path.parent / "index.csv", newline="", encoding="utf-8") as file:
        index = {int(entry["row"]): entry for entry in csv.DictReader(file)}
    entries = [index.get(row, {}) for row in rows[images]]
    if [entry.get("label") for entry in entries] != [str(label) for label in arrays["labels"]]:
        return None, "the subset has changed since the run"
    return entries, None


def choose(is_minority):
    """Return the places of at most MAX_THUMBNAILS points, the minority first."""
    order = np.argsort(~is_minority, kind="stable")
    rare, common = order[: is_minority.sum()], order[is_minority.sum() :]
    rare = rare[: MAX_THUMBNAILS // 2] if len(order) > MAX_THUMBNAILS else rare
    count = min(len(common), MAX_THUMBNAILS - len(rare))
    return np.r_[rare, common[np.linspace(0, len(common) - 1, count).astype(int)]]


def read_images(folder, entries, points):
    """Return (point, thumbnail) of the chosen points, in the aspect ratio of the source."""
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    thumbnails = []
    for point in points:
        entry = entries[point]
        sides = np.array([int(entry["width"]), int(entry["height"])])
        width, height = np.maximum(np.rint(THUMBNAIL * sides / sides.max()), 1).astype(int)
        pixels = images[int(entry["row"])]
        pixels = pixels.squeeze(2) if pixels.shape[2] == 1 else pixels
        thumbnails.append((int(point), Image.fromarray(pixels).resize((width, height))))
    return thumbnails


def make_sprite(images, columns):
    """Return all thumbnails as one picture with square tiles."""
    sprite = Image.new("RGB", (columns * THUMBNAIL, -(-len(images) // columns) * THUMBNAIL))
    for i, image in enumerate(images):
        left, top = i % columns * THUMBNAIL, i // columns * THUMBNAIL
        middle = (THUMBNAIL - image.width) // 2, (THUMBNAIL - image.height) // 2
        sprite.paste(image, (left + middle[0], top + middle[1]))
    return data_uri(sprite, quality=70)


def to_pixels(xy, limit):
    """Scale a map to MAP_SIDE pixels; y points down. limit: inf for t-SNE, which has no scale."""
    if np.isfinite(limit):
        middle, half = np.zeros(2), limit
    else:
        middle = (xy.max(axis=0) + xy.min(axis=0)) / 2
        half = max(1.03 * np.ptp(xy, axis=0).max() / 2, 1e-9)
    return (1 + (xy - middle) / half * [1, -1]) * MAP_SIDE / 2
