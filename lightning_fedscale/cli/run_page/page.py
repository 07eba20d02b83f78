"""A report as a self-contained HTML page, or as Markdown with its pictures in a folder next to it."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

from lightning_fedscale.cli.run_page.run import Run
from lightning_fedscale.cli.run_page.sections import Section, headline, sections

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h1 + p { margin: 0 0 20px; color: #555; }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 4px 20px 16px; margin: 0 0 16px; }
h2 { font-size: 18px; margin: 12px 0 8px; }
table { border-collapse: collapse; margin: 8px 0; }
th, td { padding: 3px 20px 3px 0; border-bottom: 1px solid #eef0f3; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; }
td:first-child { min-width: 12em; }
th { font-weight: 600; color: #555; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; max-width: 100%; }
figcaption { color: #555; font-size: 13px; }
img { max-width: 100%; height: auto; }
"""


def write_page(run: Run, file: str | Path) -> Path:
    """Write the report of a run.

    Args:
        run: the run, from `read_run`.
        file: path that ends in ``.html`` for a page with embedded pictures, or in ``.md`` for a page with a folder of
            pictures.

    Returns:
        The page's path.

    Raises:
        ValueError: for another ending, or if the file cannot be written.
    """
    file = Path(file)
    pages = {".html": _html, ".md": _markdown}
    if file.suffix not in pages:
        raise ValueError(f"output={str(file)!r}: name a file that ends in .html or .md.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pages[file.suffix](run, file), "utf-8")
    except OSError as error:
        raise ValueError(f"output={str(file)!r}: cannot be written: {error.strerror}.") from None
    return file


def _html(run: Run, file: Path) -> str:
    title, parts = escape(_title(run)), "\n".join(map(_html_section, sections(run)))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{title}</h1><p>{escape(headline(run))}</p>\n{parts}\n</main></body></html>\n"
    )


def _html_section(section: Section) -> str:
    lines = [f"<section><h2>{escape(section.title)}</h2>", *(f"<p>{escape(each)}</p>" for each in section.text)]
    if len(section.rows) > 1:
        head, *rows = section.rows
        cells = [f"<tr>{''.join(f'<th>{escape(each)}</th>' for each in head)}</tr>"] if any(head) else []
        cells += [f"<tr>{''.join(f'<td>{escape(each)}</td>' for each in row)}</tr>" for row in rows]
        lines += ["<table>", *cells, "</table>"]
    if section.pictures:
        types = {"svg": "image/svg+xml", "png": "image/png"}
        lines.append('<div class="pictures">')
        for title, data, kind in section.pictures:
            source = f"data:{types[kind]};base64,{base64.b64encode(data).decode()}"
            lines.append(
                f'<figure><figcaption>{escape(title)}</figcaption><img alt="{escape(title)}" src="{source}"></figure>'
            )
        lines.append("</div>")
    return "\n".join([*lines, "</section>"])


def _markdown(run: Run, file: Path) -> str:
    lines = [f"# {_title(run)}", "", f"{headline(run)}.", ""]
    folder = file.with_name(f"{file.stem}_files")
    for section in sections(run):
        lines += [f"## {section.title}", "", *(line for each in section.text for line in (each, ""))]
        if len(section.rows) > 1:
            head, *rows = section.rows
            lines += [_row(head), "|---|" + "---:|" * (len(head) - 1), *map(_row, rows), ""]
        for title, data, kind in section.pictures:
            picture = folder / f"{re.sub(r'[^a-z0-9]+', '_', f'{section.title} {title}'.lower())}.{kind}"
            folder.mkdir(exist_ok=True)
            picture.write_bytes(data)
            lines += [f"![{title}]({folder.name}/{picture.name})", ""]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(each.replace("|", "\\|").replace("\n", " ") for each in cells) + " |"


def _title(run: Run) -> str:
    whole = run.folder.resolve()
    return f"{whole.parent.name}/{whole.name}"
