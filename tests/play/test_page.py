"""The page in a real browser against the real server: a person walks, remembers and comes back."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from decmem.codec.autoencoder import Autoencoder
from decmem.experiment import to_plain
from decmem.model import WorldModel
from decmem.presets import TINY
from decmem.shards import save_weights

PAGE = Path(__file__).parents[2] / "decmem" / "play" / "page"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
# CI installs a browser, so there a missing one is a failure.
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium: apt install chromium"
)
MEMORY = 56
SOON = 60_000


def test_the_canvas_is_there_before_any_script() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert '<canvas id="dream"' in html
    body = html[html.index("<body>") :]
    assert "<script" not in body


def test_the_page_names_no_other_host_and_runs_nothing_inline() -> None:
    for path in sorted(PAGE.iterdir()):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\beval\(|new Function|innerHTML", text), path.name
        assert not re.search(r"\sstyle=|\son\w+=\"|javascript:", text), path.name


def test_every_file_the_page_asks_for_is_there() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    asked = set(re.findall(r'"/static/([\w.]+)"', html))
    for path in PAGE.glob("*.js"):
        asked |= set(re.findall(r'from "\./([\w.]+)"', path.read_text(encoding="utf-8")))
    there = {path.name for path in PAGE.iterdir()} - {"index.html"}
    assert asked == there


def test_every_control_has_a_name() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    for field in re.findall(r"<(?:input|select)\b[^>]*>", html):
        name = re.search(r'id="([\w-]+)"', field)
        place = html.index(field)
        wrapped = html.rfind("<label", 0, place) > html.rfind("</label>", 0, place)
        assert wrapped or (name and f'<label for="{name[1]}"' in html), field


def test_the_scripts_take_hold_of_what_the_page_has() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    for path in PAGE.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'(?:\bat|getElementById)\("([\w-]+)"\)', text):
            assert f'id="{name}"' in html, f"{path.name} asks for #{name}"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`decmem play` with tiny weights that know nothing: the page does not mind."""
    folder = tmp_path_factory.mktemp("play")
    codec, model = folder / "codec.safetensors", folder / "model.safetensors"
    save_weights(codec, Autoencoder(TINY.codec).state_dict(), {"codec": to_plain(TINY.codec)})
    save_weights(model, WorldModel(TINY.model).state_dict(), {"model": to_plain(TINY.model)})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "decmem", "play", "--preset", "tiny", "--device", "cpu"]
    command += ["--weights", str(model), "--codec-weights", str(codec), "--steps", "1"]
    command += ["--no-browser", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert "Walk in it" in server.stdout.readline()
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield opened
        opened.close()


class Visitor:
    """A browser window, and everything it said and heard over its WebSockets."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said: list[dict[str, Any]] = []
        self.heard: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.page.on("websocket", self._listen)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.set_default_timeout(SOON)
        self.page.goto(address)
        self.page.wait_for_selector("#enter:enabled")

    def _listen(self, line: Any) -> None:
        line.on("framesent", lambda text: self.said.append(json.loads(text)))
        line.on("framereceived", lambda frame: self.heard.append(_header(frame)))

    def enter(self, seed: int) -> None:
        self.page.fill("#seed", str(seed))
        self.page.click("#enter")
        self.wait_for_view("walk")

    def wait_for_view(self, name: str) -> None:
        # The first world of a machine waits until the renderer is compiled.
        view = f"html[data-view={name}]"
        self.page.wait_for_selector(view, state="attached", timeout=4 * SOON)

    def hears(
        self,
        kind: str,
        fits: Callable[[dict[str, Any]], bool] = lambda message: True,
        since: int | None = None,
    ) -> dict[str, Any]:
        """The first fitting message from now on, or among those heard since."""
        start = len(self.heard) if since is None else since
        for _ in range(SOON // 50):
            for message in self.heard[start:]:
                if message["type"] == kind and fits(message):
                    return message
            self.page.wait_for_timeout(50)
        last = [message["type"] for message in self.heard[-9:]]
        raise AssertionError(f"no {kind} came; last: {last}")

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["type"] == kind]

    def inks(self, canvas: str) -> int:
        """How many pixels of a canvas are not empty."""
        count = """canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width,
        canvas.height).data.filter((value, i) => i % 4 === 3 && value > 0).length"""
        return self.page.locator(canvas).evaluate(count)


def _header(frame: str | bytes) -> dict[str, Any]:
    if isinstance(frame, str):
        return json.loads(frame)
    length = int.from_bytes(frame[:4], "little")
    return json.loads(frame[4 : 4 + length])


@needs_browser
@pytest.mark.slow
def test_a_person_walks_remembers_and_comes_back(
    address: str, browser: Any, tmp_path: Path
) -> None:
    visitor = Visitor(browser, address, viewport={"width": 1280, "height": 800})
    page = visitor.page
    page.click("#die")
    visitor.enter(7)
    progress = visitor.of("progress")
    assert {message["stage"] for message in progress} >= {"render", "remember"}
    assert visitor.of("started")[0]["latents"] == MEMORY
    chunk = visitor.hears("chunk")
    visitor.hears("chunk", lambda later: later["chunk"] >= chunk["chunk"] + 3)
    assert {"type": "seen", "chunk": chunk["chunk"]} in visitor.said
    assert page.inner_text("#place") == "World 7"
    assert page.inner_text("#psnr").endswith("dB")

    _walk(visitor)
    _look_through_the_lens(visitor)
    _forget(visitor)
    _go_back(visitor)
    _branch(visitor)
    world = _take_home(visitor, tmp_path)
    _lose_the_line(visitor, address)
    _reload(visitor, world)
    assert visitor.wrong == []
    assert visitor.of("error") == []
    visitor.context.close()


def _walk(visitor: Visitor) -> None:
    page = visitor.page
    page.focus("#stage")
    before = visitor.hears("chunk")["poses"][-1]
    page.keyboard.down("w")
    visitor.hears("chunk", lambda chunk: chunk["actions"][-1][0] == 1)
    page.keyboard.down("ArrowRight")
    after = visitor.hears("chunk", lambda chunk: chunk["actions"][-1][2] > 0)["poses"][-1]
    assert abs(after[0] - before[0]) + abs(after[2] - before[2]) > 0.1
    page.keyboard.up("ArrowRight")
    # Whoever goes to another window holds no key any more.
    page.evaluate("window.dispatchEvent(new Event('blur'))")
    visitor.hears("chunk", lambda chunk: not any(chunk["actions"][-1]))
    page.keyboard.up("w")

    page.click("#stage")
    page.wait_for_function("document.pointerLockElement !== null")
    page.mouse.move(600, 300)
    page.mouse.move(700, 300, steps=5)
    turned = visitor.hears("chunk", lambda chunk: any(row[2] > 0 for row in chunk["actions"]))
    assert not any(row[0] for row in turned["actions"])
    page.evaluate("document.exitPointerLock()")
    page.wait_for_function("/\\d ms/.test(document.getElementById('latency').textContent)")
    inputs = [message for message in visitor.said if message["type"] == "input"]
    numbers = [message["sequence"] for message in inputs]
    assert numbers == sorted(set(numbers))


def _look_through_the_lens(visitor: Visitor) -> None:
    page = visitor.page
    first = page.locator("#retrieved li").first
    first.wait_for(state="visible")
    assert visitor.inks("#overlay") == 0
    first.locator("button").hover()
    assert visitor.inks("#overlay") > 0
    assert re.fullmatch(
        r"latent \d+, row [12], column [123], read \d+ times?",
        first.locator("button").get_attribute("aria-label"),
    )
    counts = page.locator("#retrieved li:visible span").all_inner_texts()
    numbers = [int(count[:-1]) for count in counts]  # without the sign for "times"
    assert numbers == sorted(numbers, reverse=True)
    page.mouse.move(5, 5)
    page.wait_for_timeout(100)
    assert visitor.inks("#overlay") == 0
    page.check("#heat")
    visitor.hears("chunk")
    page.wait_for_timeout(300)
    assert visitor.inks("#overlay") > 0
    page.select_option("#layer", label="2")
    visitor.hears("chunk", lambda chunk: chunk["lens"]["layer"] == 1)


def _forget(visitor: Visitor) -> None:
    page = visitor.page
    memory = page.get_by_role("switch", name="Global memory")
    memory.click()
    visitor.hears("chunk", lambda chunk: not (chunk["lens"] or {}).get("retrieved"))
    assert memory.get_attribute("aria-checked") == "false"
    page.get_by_text("Global memory is off").wait_for()
    page.keyboard.press("m")
    page.wait_for_selector("#memory[aria-checked=true]")
    page.fill("#k", "3")
    asked = len(visitor.heard)
    page.press("#k", "Enter")
    visitor.hears("settings", lambda message: message["k"] == 3, since=asked)


def _go_back(visitor: Visitor) -> None:
    page = visitor.page
    page.wait_for_function("document.getElementById('timeline').max > 64")
    page.focus("#timeline")
    page.keyboard.press("Home")
    page.wait_for_selector("#pause[aria-pressed=true]")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#moment").endswith("s ago")
    before = len(visitor.heard)
    page.click("#rewind")
    page.wait_for_selector("#pause[aria-pressed=false]")
    rewound = visitor.hears("rewound", since=before)
    assert rewound["latents"] == MEMORY + 1
    chunk = visitor.hears("chunk", since=visitor.heard.index(rewound))
    assert chunk["latents"] == MEMORY + 2


def _branch(visitor: Visitor) -> None:
    page = visitor.page
    page.click("#fork")
    page.wait_for_selector("#branch:enabled")
    page.wait_for_function("document.getElementById('branch').value === '1'")
    asked = len(visitor.heard)
    page.select_option("#branch", label="main")
    visitor.hears("branches", lambda message: message["current"] == 0, since=asked)
    page.wait_for_selector("html[data-view=walk] #status[data-state=running]")


def _take_home(visitor: Visitor, folder: Path) -> Path:
    page = visitor.page
    for button, suffix in (
        ("#snapshot", ".png"),
        ("#save-video", ".mp4"),
        ("#save-world", ".world"),
    ):
        with page.expect_download() as downloading:
            page.click(button)
        download = downloading.value
        assert download.suggested_filename.endswith(suffix)
        path = folder / f"saved{suffix}"
        download.save_as(path)
        assert path.stat().st_size > 1000
    return folder / "saved.world"


def _lose_the_line(visitor: Visitor, address: str) -> None:
    page = visitor.page
    known = visitor.hears("chunk")["latents"]
    visitor.context.set_offline(True)
    page.wait_for_selector("#veil", state="visible")
    visitor.context.set_offline(False)
    page.wait_for_selector("#veil", state="hidden")
    assert visitor.hears("chunk")["latents"] >= known
    hellos = visitor.of("hello")
    assert hellos[-1]["session"] == hellos[0]["session"]
    assert page.inner_text("#place") == "World 7"


def _reload(visitor: Visitor, world: Path) -> None:
    page = visitor.page
    page.reload()
    visitor.wait_for_view("walk")
    visitor.hears("chunk")
    assert page.get_attribute("#timeline", "min") == str(MEMORY)
    # A saved memory begins a world of its own.
    page.click("#leave")
    page.get_by_text("Saved", exact=True).click()
    page.set_input_files("#world", world)
    page.click("#enter")
    started = visitor.hears("started")
    assert started["latents"] > MEMORY
    assert started["seed"] == 7
    visitor.wait_for_view("walk")
    assert visitor.hears("chunk")["latents"] > started["latents"]


@needs_browser
def test_a_refused_file_is_told_with_its_cure(address: str, browser: Any, tmp_path: Path) -> None:
    visitor = Visitor(browser, address)
    page = visitor.page
    page.get_by_text("Picture", exact=True).click()
    text = tmp_path / "notes.png"
    text.write_text("no picture at all")
    page.set_input_files("#picture", text)
    page.click("#enter")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "picture" in alert.inner_text()
    assert "Give" in alert.inner_text()
    alert.get_by_role("button", name="Dismiss").click()
    assert page.get_by_role("alert").count() == 0
    visitor.context.close()


@needs_browser
@pytest.mark.slow
def test_nothing_overlaps_or_sticks_out_at_any_width(address: str, browser: Any) -> None:
    phone = {"width": 360, "height": 740}
    visitor = Visitor(
        browser, address, viewport=phone, has_touch=True, is_mobile=True, color_scheme="dark"
    )
    page = visitor.page
    _check_layout(visitor)
    visitor.enter(7)
    visitor.hears("chunk")
    for width, height in ((360, 740), (740, 360), (880, 700), (1024, 768), (1440, 900)):
        page.set_viewport_size({"width": width, "height": height})
        _check_layout(visitor)
    page.set_viewport_size(phone)
    _walk_with_a_thumb(visitor)
    assert visitor.wrong == []
    visitor.context.close()


def _check_layout(visitor: Visitor) -> None:
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    crossing = """() => {
        const shown = [...document.querySelectorAll("main button, main select, main input")]
            .filter((field) => field.checkVisibility() && !field.closest("#veil, .stage"));
        const boxes = shown.map((field) => field.getBoundingClientRect());
        const out = [];
        boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
            const apart = a.right <= b.left || b.right <= a.left
                || a.bottom <= b.top || b.bottom <= a.top;
            if (!apart) out.push(`${shown[i].id} ${shown[i + 1 + j].id}`);
        }));
        return out;
    }"""
    assert visitor.page.evaluate(crossing) == []


def _walk_with_a_thumb(visitor: Visitor) -> None:
    stick = visitor.page.locator("#stick").bounding_box()
    x, y = stick["x"] + stick["width"] / 2, stick["y"] + stick["height"] / 2
    visitor.page.mouse.move(x, y)
    visitor.page.mouse.down()
    visitor.page.mouse.move(x, y - 40)
    chunk = visitor.hears("chunk", lambda chunk: chunk["actions"][-1][0] == 1)
    assert chunk["actions"][-1][1] == 0
    visitor.page.mouse.up()
    visitor.hears("chunk", lambda chunk: not any(chunk["actions"][-1]))
