"""Which colours, and can they be read? In light and in dark.

A series has a colour, a marker and a dash, so that it is known without colour. A heat map's ramp runs in lightness
from the page's own colour to its opposite; each level's text is black or white, whichever has the larger contrast,
which is never below 4.5.

Sources: WCAG 2.2, relative luminance and contrast ratio; Ottosson, "A perceptual color space for image processing"
(2020) for OKLab.
"""

from __future__ import annotations

import numpy as np

THEMES = {
    "light": {
        "paper": "#ffffff", "raised": "#f4f6f8", "ink": "#1a1f24", "muted": "#57606a", "line": "#d5dbe1",
        "frame": "#7d8791", "link": "#0a5a9c", "focus": "#0a5a9c",
    },
    "dark": {
        "paper": "#12161a", "raised": "#1c2228", "ink": "#e6eaee", "muted": "#a3adb7", "line": "#343c44",
        "frame": "#87919b", "link": "#79b8f3", "focus": "#ffd166",
    },
}  # fmt: skip
"""Colours of page and text by theme; the page's CSS variables."""

SERIES = {
    "light": ("#cf5a14", "#2b5b1f", "#1f78c8", "#8a3fa0", "#8a6200", "#00797a", "#c02a78", "#505a64"),
    "dark": ("#ff8a66", "#c3e88d", "#5fb2f2", "#d6a1f2", "#e8bb55", "#4fd6cf", "#ff93c4", "#b4bfca"),
}
"""Colours of series; the first three are LoRA's, CoTo's and CopRA's, apart in lightness and hue for every
kind of colour vision. At least 3 : 1 against the page."""
DASHES = (None, "7 3", "2 2.5", "10 3 2 3", "5 2", "1 3", "8 2 1 2 1 2", "12 4")

RAMPS = {"light": ("#f3f6fa", "#7fb0d3", "#0d2f57"), "dark": ("#1b2530", "#2f6f9f", "#d8eefc")}
"""A heat map's colours from its lowest to its highest value."""
LEVELS = 21


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, in [0, 1]."""
    return float(_linear(colour) @ (0.2126, 0.7152, 0.0722))


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, from 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ramp(theme: str) -> list[str]:
    """`LEVELS` colours from a heat map's lowest to its highest value, evenly spaced in OKLab."""
    stops = np.array([_to_oklab(colour) for colour in RAMPS[theme]])
    places = np.linspace(0.0, len(stops) - 1, LEVELS)
    mixed = np.stack([np.interp(places, range(len(stops)), stops[:, i]) for i in range(3)], 1)  # (LEVELS, 3)
    return [_from_oklab(lab) for lab in mixed]


def text_on(colour: str) -> str:
    """Black or white, whichever is read better on a colour."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, colour))


def level(value: float, low: float, high: float) -> int:
    """Which of the ramp's levels stands for a value between `low` and `high`."""
    share = (value - low) / (high - low) if high > low else 0.5
    return round(min(max(share, 0.0), 1.0) * (LEVELS - 1))


def theme_css(theme: str) -> str:
    """The colours of a theme as CSS declarations: page, series `.c<i>` and heat levels `.h<i>`, `.t<i>`."""
    root = "".join(f"--{name}:{colour};" for name, colour in THEMES[theme].items())
    series = "".join(f".c{i}{{color:{colour}}}" for i, colour in enumerate(SERIES[theme]))
    heat = "".join(f".h{i}{{fill:{c}}}.t{i}{{fill:{text_on(c)}}}" for i, c in enumerate(ramp(theme)))
    return f":root{{color-scheme:{theme};{root}}}{series}{heat}"


def _linear(colour: str) -> np.ndarray:
    """Linear red, green, blue in [0, 1]."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


_TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929],
                    [0.2119034982, 0.6806995451, 0.1073969566],
                    [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                    [1.9779984951, -2.4285922050, 0.4505937099],
                    [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def _to_oklab(colour: str) -> np.ndarray:
    return _TO_LAB @ np.cbrt(_TO_LMS @ _linear(colour))


def _from_oklab(lab: np.ndarray) -> str:
    linear = np.clip(np.linalg.solve(_TO_LMS, np.linalg.solve(_TO_LAB, lab) ** 3), 0.0, 1.0)
    channels = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * c):02x}" for c in channels)
