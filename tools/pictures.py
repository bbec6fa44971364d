"""`make pictures`: the README's animated picture of an explorer in a running JupyterLab.

    python -m tools.pictures

Runs a copy of notebook 01 in a headless browser, moves the sliders of its explorer by keyboard, and
writes screenshots to data/explorer.png, an animated PNG. Needs Chromium or Chrome.
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from chapter13.atomic import replacing
from tools.browser import ROOT, explorer, jupyterlab, launch, wait_for

NOTEBOOK = "01_absmax_int8.ipynb"
TARGET = ROOT / "data" / "explorer.png"
MOST_BYTES = 1_500_000
# (slider, key, times, milliseconds of each picture); with 0 milliseconds it is not shown
STORY = [
    ("outlier", "Home", 1, 0),
    ("bits", "End", 1, 1500),
    ("outlier", "ArrowRight", 20, 150),
    ("outlier", "End", 1, 2000),
    ("outlier", "Home", 1, 1500),
    ("bits", "ArrowLeft", 6, 700),
    ("bits", "End", 1, 1500),
]


def frames(page, panel):
    """(picture, milliseconds) after each key of the story, when the panel has been updated."""
    readout = panel.locator(".widget-html-content")
    for slider, key, times, milliseconds in STORY:
        row = panel.locator(".widget-hslider").filter(has_text=slider)
        for _ in range(times):
            before = readout.inner_text()
            row.locator(".noUi-handle").focus()
            page.keyboard.press(key)
            try:
                wait_for(lambda: readout.inner_text() != before, "a new readout", 2)  # noqa: B023
            except TimeoutError:
                pass  # the slider was already at its end
            page.wait_for_timeout(100)  # the picture is updated after the readout
            if milliseconds:
                picture = Image.open(io.BytesIO(panel.screenshot())).convert("RGB")
                yield picture, milliseconds


def animate(pictures, milliseconds, path):
    """Write an animated PNG atomically; all pictures share 256 colors."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width, height * 3))
    for row, place in enumerate((0, len(pictures) // 2, -1)):
        sheet.paste(pictures[place], (0, row * height))
    palette = sheet.quantize(256)
    flat = [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in pictures]
    with replacing(path) as part:
        flat[0].save(
            part,
            format="png",
            save_all=True,
            append_images=flat[1:],
            duration=milliseconds,
            loop=0,
            optimize=True,
        )
        size = part.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"{path.name} would have {size} bytes, more than {MOST_BYTES}")
    print(f"{path.relative_to(ROOT)}: {len(flat)} pictures, {width} x {height}, {size} bytes")


def main():
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        shutil.copy(ROOT / "notebooks" / NOTEBOOK, Path(folder))
        browser = launch(playwright)
        with jupyterlab(folder) as lab:
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            lab.run_all(page, NOTEBOOK)
            pictures, milliseconds = zip(*frames(page, explorer(page)), strict=True)
        browser.close()
    animate(pictures, list(milliseconds), TARGET)


if __name__ == "__main__":
    main()
