"""Figures: one look for each method, readable in grey and on both backgrounds."""

import finetune
import pretrain
from reporting.styles import METHOD_STYLES

PAPER, DARK = "#FFFFFF", "#15181D"


def luminance(colour):
    """Relative luminance of a hex colour (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_every_method_has_a_look_of_its_own():
    assert {*pretrain.METHODS, *finetune.LOSSES, *finetune.RETRAIN} <= METHOD_STYLES.keys()
    styles = METHOD_STYLES.values()
    assert len({style.name for style in styles}) == len(METHOD_STYLES)
    assert len({style.marker for style in styles}) == len(METHOD_STYLES)
    # What was not trained shares one grey.
    assert len({style.colour for style in styles}) == len(METHOD_STYLES) - 1


def test_colours_stand_out_on_both_backgrounds():
    for name, style in METHOD_STYLES.items():
        assert min(contrast(style.colour, back) for back in (PAPER, DARK)) >= 2.8, name
