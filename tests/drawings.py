"""What a drawing looks like on a page, measured in its SVG."""

import re
from pathlib import Path

PAGE = 600  # points: 800 pixels of a screen


def smallest_text(svg: Path) -> float:
    """The size in points of a figure's smallest text when the figure is as wide as the page."""
    text = svg.read_text(encoding="utf-8")
    width = float(re.search(r'<svg[^>]*? width="([\d.]+)pt"', text)[1])
    return min(float(size) for size in re.findall(r"font(?:-size)?: (?:[a-z0-9]+ )*([\d.]+)px", text)) * PAGE / width
