"""Renders the colour emoji of a font to PNG files by Unicode's groups: a real data set of one's own pictures.

`python -m tools.emoji --out DIR` reads what Debian's fonts-noto-color-emoji and unicode-data install.
The font's pictures are under the SIL Open Font License; they are not part of this repository.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
FONT_SIZE, SIDE = 109, 136  # the only size of the font's bitmaps, and their width in pixels
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
LEFT_OUT = "Component"  # skin tones and hair by themselves


def read_emoji(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (group, name, text) of every fully qualified emoji without a skin tone.

    Args:
        path: Unicode's emoji-test.txt.
    """
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        match = re.match(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E[\d.]+ (.+)", line)
        if match and group != LEFT_OUT:
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            if not SKIN_TONES & set(text):
                yield group, match[2], text


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Returns one emoji in the middle of a transparent square, RGBA; None where the font has none."""
    left, top, right, bottom = font.getbbox(text)
    if not 0 < right - left <= SIDE:
        return None
    picture = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    corner = ((SIDE - (right - left)) / 2 - left, (SIDE - (bottom - top)) / 2 - top)
    ImageDraw.Draw(picture).text(corner, text, font=font, embedded_color=True)
    return picture if picture.getbbox() else None


def file_name(text: str) -> str:
    """Returns lower-case words joined by dashes."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes OUT/GROUP/NAME.png for every emoji and says how many."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--names", type=Path, default=NAMES, help="Unicode's emoji-test.txt")
    arguments = parser.parse_args(argv)
    font = ImageFont.truetype(arguments.font, FONT_SIZE)
    counts: dict[str, int] = {}
    for group, name, text in read_emoji(arguments.names):
        picture = render(text, font)
        if picture is not None:
            folder = arguments.out / file_name(group)
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{file_name(name)}.png")
            counts[folder.name] = counts.get(folder.name, 0) + 1
    print(f"{sum(counts.values())} emoji in {len(counts)} groups: {counts}")


if __name__ == "__main__":
    main()
