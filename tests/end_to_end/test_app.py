"""The web demo: what its buttons call, bad input, and the page in a headless browser (slow; needs Chromium,
selenium).
"""

import io
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.app import NO_CLASS, Studio, build_page, enlarge, first_of, main, read_drawing, read_names, side_by_side
from generation import Pipeline
from generation.editing import token_mask
from tests.helpers import photographs, tiny_model, tiny_vae

SETTINGS = (5, 2.0, 0.9, 3)  # seed, guidance, temperature, iterations


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(Pipeline(tiny_model(), tiny_vae().requires_grad_(False)), ["zero", "one"])


def generated(studio: Studio, classes: list, **edit: Image.Image) -> np.ndarray:
    """The sheet of what the pipeline generates with SETTINGS."""
    images = studio.pipeline.generate(classes, seed=5, cfg=2.0, temperature=0.9, num_iter=3, **edit)
    return np.asarray(side_by_side(images))


def drawing(size: int = 128, painted: slice = slice(0, 64)) -> dict:
    """What the editor hands over: a photograph of size x size, its rows and columns in `painted` painted over."""
    layer = np.zeros((size, size, 4), np.uint8)
    layer[painted, painted] = (255, 64, 129, 255)
    background = np.dstack([photographs()[0][:size, :size], np.full((size, size), 255, np.uint8)])
    return {"background": background, "layers": [layer], "composite": None}


def test_the_last_picture_is_what_generate_returns(studio: Studio) -> None:
    *before, (sheet, line) = studio.generate("one", *SETTINGS, count=3)
    assert np.array_equal(np.asarray(sheet), generated(studio, [1, 1, 1]))
    assert line.startswith("done: class one, seed 5")
    assert before and re.fullmatch(r"step 1 of 3: 3 of 16 tokens are known", before[0][1])
    assert (np.asarray(before[0][0]) == 128).mean() > 0.5  # most tokens are grey after the first step
    assert len(list(studio.generate("one", *SETTINGS, count=3, watch=False))) == 1
    *_, (no_class, _) = studio.generate(NO_CLASS, *SETTINGS)
    assert np.array_equal(np.asarray(no_class), generated(studio, [None]))


def test_only_the_painted_part_is_regenerated(studio: Studio) -> None:
    image, mask = read_drawing(drawing(), 64)
    white = np.asarray(mask) > 127
    assert image.size == mask.size == (64, 64) and white[:30, :30].all() and not np.asarray(mask)[34:, 34:].any()
    *_, (sheet, _) = studio.generate("one", *SETTINGS, drawing=drawing())
    assert np.array_equal(np.asarray(sheet), generated(studio, [1], init=image, mask=mask))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(drawing={}), "no picture to edit"),
        (dict(drawing={"background": None}), "no picture to edit"),
        (dict(drawing=drawing(painted=slice(0, 0))), "nothing was painted"),
        (dict(name="cat"), "class 'cat' is none of the model's 10"),
        (dict(count=17), "1 to 16 pictures"),
        (dict(seed=-1), "negative"),
        (dict(num_iter=0), "num_iter"),
        (dict(order="spiral"), "order"),
    ],
)
def test_settings_that_do_not_fit(studio: Studio, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(studio.generate(**(dict(name="one", seed=0, cfg=1.0, temperature=1.0, num_iter=2) | changes)))


def test_sheets() -> None:
    pictures = [Image.new("RGB", (32, 32), (i * 20, 0, 0)) for i in range(5)]
    for count, size in ((1, (256, 256)), (2, (256, 128)), (4, (256, 256)), (5, (288, 192))):
        sheet = side_by_side(pictures[:count])
        assert sheet.size == size
        first = Image.fromarray(first_of(np.asarray(sheet), count)).resize((32, 32), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(first), np.asarray(pictures[0]))
    assert first_of(None, 4) is None


def test_bad_input_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    """The checkpoint does not exist: loading it would be another error."""
    pytest.importorskip("gradio", reason="gradio, an optional extra, is not installed: make extras")
    names, resume = tmp_path / "names.json", ["--resume", str(tmp_path / "nowhere")]
    names.write_text('{"1": "one"}')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags, words in (
            (["--port", port], rf"cannot serve at 127\.0\.0\.1:{port} \(--host, --port\)"),
            (["--port", "70000"], r"cannot serve at 127\.0\.0\.1:70000"),
            (["--names", str(names)], r"names\.json \(--names\) holds no class names"),
        ):
            with pytest.raises(ValueError, match=words):
                main([*resume, *flags])
    names.write_text('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}')
    assert read_names(str(names)) == ["tench", "goldfish"]


def test_without_gradio_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match="make extras, or pip install -r requirements-extra.txt"):
        main([])


@pytest.fixture
def page(studio: Studio) -> Iterator[str]:
    """The address of the running page."""
    gradio = pytest.importorskip("gradio", reason="gradio, an optional extra, is not installed: make extras")
    blocks = build_page(studio, "TokenBridge: test").queue(default_concurrency_limit=1)
    theme, options = gradio.themes.Base(font=["system-ui"]), dict(share=False, quiet=True, ssr_mode=False)
    _, address, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, theme=theme, **options)
    yield address
    blocks.close()


@pytest.fixture
def browser(tmp_path: Path):
    """A headless Chromium of the distribution, driven through its own chromedriver."""
    reason = "selenium, an optional extra, is not installed: make extras"
    selenium = pytest.importorskip("selenium.webdriver", reason=reason)
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium and chromedriver on this machine (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1200,1500"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path}")
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


def wait_for(what: Callable[[], object], seconds: float = 60):
    """The first true value of what(), called repeatedly."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            value = what()
        except WebDriverException:
            value = None
        if value:
            return value
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_page_in_a_browser(studio, page, browser, monkeypatch):
    """Choose a class and seed, generate, take the result, paint, regenerate.

    Pixels are compared with the pipeline's.
    """
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(css: str):
        return browser.find_element(By.CSS_SELECTOR, css)

    def enter(css: str, value: object, key: str = Keys.TAB) -> None:
        box = wait_for(lambda: find(css))
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(str(value), key)

    def line(name: str) -> str:
        return find(f"#{name} textarea, #{name} input").get_attribute("value") or ""

    def picture(css: str) -> np.ndarray:
        with urllib.request.urlopen(find(css).get_attribute("src")) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))

    browser.get(page)
    enter("#class input", "one", Keys.ENTER)
    enter("#seed input", 5)
    for name, value in (("cfg", 2), ("temperature", 0.9), ("iterations", 3), ("count", 4)):
        enter(f"#{name} input[type=number]", value)
    find("#go").click()
    wait_for(lambda: line("line").startswith("done: class one, seed 5"))
    wait_for(lambda: np.array_equal(picture("#result img"), generated(studio, [1] * 4)))

    tabs = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
    next(tab for tab in tabs if tab.text.strip() == "edit").click()
    wait_for(lambda: find("#take").is_displayed())
    find("#take").click()
    canvas = wait_for(lambda: find("#editor canvas"))
    time.sleep(2)  # the editor fits its picture to the canvas
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    time.sleep(0.5)
    stroke = ActionChains(browser).move_to_element_with_offset(canvas, -30, -30).click_and_hold()
    stroke.move_by_offset(40, 0).move_by_offset(0, 30).release().perform()
    time.sleep(1)
    drawings, generate = [], studio.generate
    monkeypatch.setattr(studio, "generate", lambda *values: drawings.append(values[-1]) or generate(*values))
    find("#draw").click()
    wait_for(lambda: line("edit-line").startswith("done: class one"))
    wait_for(lambda: find("#edited img").get_attribute("src"))
    image, mask = read_drawing(drawings[0], 64)
    chosen = token_mask(mask, 64, 4).view(4, 4)
    assert chosen[1, 1] and not chosen[0].any() and not chosen[:, 3].any(), "the stroke went through the middle"
    taken = np.asarray(enlarge(image))
    assert np.array_equal(taken, generated(studio, [1])), "the first picture is unchanged by its way through the page"
    assert np.array_equal(picture("#edited img"), generated(studio, [1], init=image, mask=mask))
    assert all(entry["level"] != "SEVERE" or "favicon" in entry["message"] for entry in browser.get_log("browser"))
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    outside = [url for url in requests if url.startswith("http") and "127.0.0.1" not in url]
    assert not outside, "the page asks other machines for nothing"
