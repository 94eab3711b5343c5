"""What a visitor does with the page, and what is read from it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Literal

from playwright.sync_api import FilePayload, Page, expect

ARTIFACTS = Path(__file__).parents[2] / "test-artifacts" / "page"

# Delivers files as a drop or a paste does: the browser's own DataTransfer, its own events.
_TRANSFER = """([kind, files]) => {
  const transfer = new DataTransfer();
  for (const { name, data } of files) {
    transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type: 'image/png' }));
  }
  const options = { bubbles: true, cancelable: true };
  const target = document.getElementById('drop');
  if (kind === 'paste') target.dispatchEvent(new ClipboardEvent('paste', { ...options, clipboardData: transfer }));
  else for (const type of ['dragenter', 'dragover', 'drop']) {
    target.dispatchEvent(new DragEvent(type, { ...options, dataTransfer: transfer }));
  }
}"""

# Contrast as WCAG 2.2 defines it (1.4.3), of every visible text on the opaque background that lies behind it.
_LOW_CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const style = getComputedStyle(node);
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest(':disabled, script')) continue;
    const [a, b] = [light(parts(style.color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""
_CONTROLS = {"button", "link", "checkbox", "slider", "combobox", "textbox", "img", "image", "dialog", "progressbar"}


def upload(name: str, data: bytes) -> FilePayload:
    """Returns a file for the chooser."""
    return {"name": name, "mimeType": "image/png", "buffer": data}


def choose(page: Page, *files: FilePayload) -> None:
    """Chooses files."""
    page.locator("#file").set_input_files(list(files))


def deliver(page: Page, way: Literal["drop", "paste"], *files: FilePayload) -> None:
    """Drops or pastes files."""
    encoded = [{"name": file["name"], "data": base64.b64encode(file["buffer"]).decode()} for file in files]
    page.evaluate(_TRANSFER, [way, encoded])


def expect_verdict(page: Page, verdict: str) -> None:
    """Waits until the page shows an answer with this verdict."""
    expect(page.locator("#result")).to_be_visible()
    expect(page.locator("#verdict")).to_have_text(verdict)


def shown_bars(page: Page) -> dict[str, str]:
    """Returns the classes and their shares, as they are written on the page."""
    names = page.locator("#bars .name").all_text_contents()
    return dict(zip(names, page.locator("#bars .share").all_text_contents(), strict=True))


def keep_screenshot(page: Page, name: str) -> None:
    """Keeps a picture of the whole page in `test-artifacts/page`."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=True, animations="disabled")


def low_contrast(page: Page) -> list[str]:
    """Returns the visible texts that are harder to read than WCAG 2.2 allows, with their contrast."""
    return page.evaluate(_LOW_CONTRAST)


def nameless_controls(page: Page) -> list[str]:
    """Returns what the browser tells a screen reader of controls without saying what they are."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    controls = [n for n in nodes if not n["ignored"] and n["role"]["value"].lower() in _CONTROLS]
    assert controls
    return [n["role"]["value"] for n in controls if not n.get("name", {}).get("value", "").strip()]
