"""`make slides-pdf`: PDF files beside the decks in build/slides/, one page per slide.

    python -m tools.slides.pdf [NOTEBOOK...]        all numbered ones if none is named

A headless Chromium or Chrome prints reveal.js's own layout for printing.
"""

import argparse
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from chapter13.atomic import replacing
from tools.browser import NoBrowser, launch
from tools.notebooks import numbered
from tools.slides.build import NoPackages, build


def print_pdf(browser, deck):
    """Print the deck at `deck`, a Path; returns the PDF's path."""
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    try:
        page.goto(f"{deck.as_uri()}?print-pdf")
        slides = page.wait_for_function(
            "window.Reveal?.isReady() && document.querySelector('.pdf-page') && "
            "Reveal.getTotalSlides()",
            timeout=60_000,
        ).json_value()
        page.wait_for_function(f"document.querySelectorAll('.pdf-page').length === {slides}")
        with replacing(deck.with_suffix(".pdf")) as part:
            page.pdf(path=part, prefer_css_page_size=True, print_background=True)
    finally:
        page.close()
    return deck.with_suffix(".pdf")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all numbered notebooks")
    arguments = parser.parse_args()
    try:
        with sync_playwright() as playwright:
            browser = launch(playwright)
            for deck in build(arguments.notebooks or numbered()):
                print(print_pdf(browser, deck))
            browser.close()
    except (NoBrowser, NoPackages) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
