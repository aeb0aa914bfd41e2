"""Opens the page of `compressor demo --web` in headless Chromium, uses it, and writes pictures of it into docs/.

    python runs/screenshots.py [--checkpoint CHECKPOINT] [--output docs]

Needs the extras `web` and `browser`, and Chromium (`--browser`, by default /usr/bin/chromium).
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from compressor.errors import CompressorError
from compressor.streams import exits_cleanly

CHROMIUM = "/usr/bin/chromium"
OFFLINE = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
"""Chromium as root, without a screen, asking nobody for anything."""


class Visit:
    """A browser with the page open; for use as a context.

    Args:
        url: of the page.
        dark: as a system with dark colours asks for.
    """

    def __init__(self, url: str, width: int = 1280, height: int = 900, dark: bool = False, browser: str = CHROMIUM):
        from playwright.sync_api import sync_playwright

        self.url, self.errors = url, list[str]()
        self.driver = sync_playwright().start()
        self.chromium = self.driver.chromium.launch(executable_path=browser, args=OFFLINE)
        self.page: Any = self.chromium.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self.page.set_default_timeout(300_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def __enter__(self) -> "Visit":
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_selector("#kv-compress")
        return self

    def __exit__(self, *error: object) -> None:
        self.chromium.close()
        self.driver.stop()

    def status(self, pattern: str) -> str:
        """Wait until the line about the work matches."""
        self.page.wait_for_function("p => document.querySelector('#kv-status')?.innerText.match(p)", arg=pattern)
        return self.text("#kv-status")

    def text(self, part: str) -> str:
        return self.page.locator(part).inner_text()

    def type(self, passage: str) -> None:
        self.page.locator("#kv-passage textarea").fill(passage)

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def example(self, number: int) -> None:
        self.page.locator(".kv-examples button").nth(number).click()

    def slide(self, steps: int) -> None:
        """Move the slider of memory tokens by keys."""
        slider = self.page.locator("#kv-tokens input[type=range]")
        slider.focus()
        for _ in range(abs(steps)):
            slider.press("ArrowRight" if steps > 0 else "ArrowLeft")

    def ask(self, question: str) -> None:
        box = self.page.locator("#kv-question").locator("textarea, input").first
        box.fill(question)
        box.press("Enter")

    def download(self, folder: Path) -> Path:
        """Save the memory."""
        with self.page.expect_download() as found:
            self.page.locator("#kv-save").click()
        path = folder / found.value.suggested_filename
        found.value.save_as(path)
        return path

    def upload(self, file: Path) -> None:
        """Load a memory."""
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#kv-load").click()
        chooser.value.set_files(str(file))

    def picture(self, path: Path) -> None:
        self.page.screenshot(path=str(path), full_page=True)
        print(path)


@exits_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--browser", default=CHROMIUM)
    options = parser.parse_args()
    from compressor.commands.options import DemoConfig
    from compressor.commands.web import look, page_of, reach_this_machine

    if not Path(options.browser).exists():
        raise CompressorError(f"there is no {options.browser}: install Chromium, or name it with --browser")
    with tempfile.TemporaryDirectory() as folder:
        made = page_of(DemoConfig(checkpoint=options.checkpoint), Path(folder))
        reach_this_machine()
        _, url, _ = made.launch(
            server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, inbrowser=False, **look()
        )
        with Visit(url, browser=options.browser) as visit:
            visit.status(r"Writing: [4-7]\d of")
            visit.picture(options.output / "page-writing.png")
            visit.status("came back")
            visit.example(3)
            visit.status("Compressing|Writing")
            visit.status("came back")
            visit.ask("Where was Marie Curie born?")
            visit.status("Answered")
            visit.picture(options.output / "page-answers.png")
        with Visit(url, 390, 844, dark=True, browser=options.browser) as visit:
            visit.status(r"Writing: [6-9]\d of")
            visit.picture(options.output / "page-phone.png")
        made.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
