"""The web demo: what its buttons call, bad input, and the page itself in a real headless browser (slow; Chromium and selenium needed)."""

import io
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import app
from demo.app import NO_CLASS, Studio, build_page, enlarge, first_of, main, read_drawing, side_by_side
from generation.library import generate, token_mask
from tests.helpers import photographs, tiny_model, tiny_vae

SETTINGS = (5, 2.0, 0.9, 3)  # seed, guidance, temperature, iterations


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(tiny_model(), tiny_vae().requires_grad_(False), ["zero", "one"])


def drawing(size: int = 128, painted: slice = slice(0, 64)) -> dict:
    """What the editor hands over: a photograph of size x size, its rows and columns in `painted` painted over."""
    layer = np.zeros((size, size, 4), np.uint8)
    layer[painted, painted] = (255, 64, 129, 255)
    photo = photographs()[0][:size, :size]
    return {
        "background": np.dstack([photo, np.full((size, size), 255, np.uint8)]),
        "layers": [layer],
        "composite": None,
    }


# ------------------------------------------------------------------------------------------------------- without a browser


def test_the_last_picture_is_what_generate_returns(studio: Studio) -> None:
    *before, (sheet, line) = studio.generate("one", *SETTINGS, count=3)
    expected = generate(studio.model, studio.vae, [1, 1, 1], seed=5, cfg=2.0, temperature=0.9, num_iter=3)
    assert np.array_equal(np.asarray(sheet), np.asarray(side_by_side(expected))) and line.startswith(
        "done: class one, seed 5"
    )
    assert before and re.fullmatch(r"step 1 of 3: 3 of 16 tokens are known", before[0][1])
    assert (np.asarray(before[0][0]) == 128).mean() > 0.5  # most tokens are grey after the first step
    assert len(list(studio.generate("one", *SETTINGS, count=3, watch=False))) == 1
    no_class = list(studio.generate(NO_CLASS, *SETTINGS))[-1][0]
    assert np.array_equal(
        np.asarray(no_class),
        np.asarray(
            enlarge(generate(studio.model, studio.vae, [None], seed=5, cfg=2.0, temperature=0.9, num_iter=3)[0])
        ),
    )


def test_only_the_painted_part_is_drawn_anew(studio: Studio) -> None:
    image, mask = read_drawing(drawing(), 64)
    assert (
        image.size == mask.size == (64, 64)
        and (np.asarray(mask)[:30, :30] > 127).all()
        and (np.asarray(mask)[34:, 34:] == 0).all()
    )
    *_, (sheet, _) = studio.generate("one", *SETTINGS, drawing=drawing())
    expected = generate(
        studio.model, studio.vae, [1], seed=5, cfg=2.0, temperature=0.9, num_iter=3, init=image, mask=mask
    )
    assert np.array_equal(np.asarray(sheet), np.asarray(enlarge(expected[0])))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "no picture to edit"),
        ({"background": None}, "no picture to edit"),
        (drawing(painted=slice(0, 0)), "nothing was painted"),
    ],
)
def test_drawings_that_say_nothing(studio: Studio, value: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(studio.generate("one", *SETTINGS, drawing=value if value is not None else {}))


def test_settings_that_do_not_fit(studio: Studio) -> None:
    for changes, words in (
        (dict(name="cat"), "class 'cat' is none of the model's 10"),
        (dict(count=17), "1 to 16 pictures"),
        (dict(seed=-1), "negative"),
        (dict(num_iter=0), "num_iter"),
        (dict(order="spiral"), "order"),
    ):
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


def test_bad_input_is_refused_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="gradio, an optional extra, is not installed: make extras")
    monkeypatch.setattr(app, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"cannot serve at 127\.0\.0\.1:\d+ \(--host, --port\)"):
            main(["--port", str(taken.getsockname()[1])])
    with pytest.raises(ValueError, match=r"cannot serve at 127\.0\.0\.1:70000"):
        main(["--port", "70000"])
    (tmp_path / "names.json").write_text('{"1": "one"}')
    with pytest.raises(ValueError, match=r"names\.json \(--names\) holds no class names"):
        main(["--names", str(tmp_path / "names.json")])
    (tmp_path / "names.json").write_text('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}')
    assert app.read_names(str(tmp_path / "names.json")) == ["tench", "goldfish"]


def test_without_gradio_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match="make extras, or pip install -r requirements-extra.txt"):
        main([])


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def page(studio: Studio) -> Iterator[str]:
    """The address of the running page."""
    gradio = pytest.importorskip("gradio", reason="gradio, an optional extra, is not installed: make extras")
    blocks = build_page(studio, "TokenBridge: test")
    _, address, _ = blocks.queue(default_concurrency_limit=1).launch(
        server_name="127.0.0.1",
        share=False,
        quiet=True,
        ssr_mode=False,
        prevent_thread_lock=True,
        theme=gradio.themes.Base(font=["system-ui"]),
    )
    yield address
    blocks.close()


@pytest.fixture
def browser(tmp_path: Path):  # noqa: ANN201
    """A headless Chromium of the distribution, driven through its own chromedriver."""
    selenium = pytest.importorskip(
        "selenium.webdriver", reason="selenium, an optional extra, is not installed: make extras"
    )
    program, driver = (
        shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if not program or not driver:
        pytest.skip("no chromium and chromedriver on this machine (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1200,1500",
        f"--user-data-dir={tmp_path}",
    ):
        options.add_argument(flag)
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


def wait_for(what, seconds: float = 60):  # noqa: ANN001, ANN201
    """The first true value of what(), asked again and again."""
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
def test_the_page_in_a_browser(
    studio: Studio, page: str, browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # noqa: ANN001
    """A person's way through it: choose a class and seed, generate, take the result, paint, draw anew. Pixels are compared with generate's."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(css: str):  # noqa: ANN202
        return browser.find_element(By.CSS_SELECTOR, css)

    def choose_number(css: str, value: object) -> None:
        box = wait_for(lambda: find(css))
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(str(value), Keys.TAB)

    def value_of(css: str) -> str:
        return find(css).get_attribute("value") or ""

    def picture(css: str) -> np.ndarray:
        with urllib.request.urlopen(find(css).get_attribute("src")) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))

    browser.get(page)
    box = wait_for(lambda: find("#class input"))
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("one", Keys.ENTER)
    for css, value in (
        ("#seed input", 5),
        ("#cfg input[type=number]", 2),
        ("#temperature input[type=number]", 0.9),
        ("#iterations input[type=number]", 3),
        ("#count input[type=number]", 4),
    ):
        choose_number(css, value)
    find("#go").click()
    seen = set()
    wait_for(
        lambda: (
            seen.add(value_of("#line textarea, #line input"))
            or any(line.startswith("done: class one, seed 5") for line in seen)
        )
    )
    expected = side_by_side(generate(studio.model, studio.vae, [1] * 4, seed=5, cfg=2.0, temperature=0.9, num_iter=3))
    wait_for(lambda: np.array_equal(picture("#result img"), np.asarray(expected)))
    browser.save_screenshot(str(tmp_path / "generate.png"))

    next(
        tab for tab in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if tab.text.strip() == "edit"
    ).click()
    wait_for(lambda: find("#take").is_displayed())
    find("#take").click()
    canvas = wait_for(lambda: find("#editor canvas"))
    time.sleep(2)  # the editor fits its picture to the canvas
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    time.sleep(0.5)
    ActionChains(browser).move_to_element_with_offset(canvas, -30, -30).click_and_hold().move_by_offset(
        40, 0
    ).move_by_offset(0, 30).release().perform()
    time.sleep(1)
    browser.save_screenshot(str(tmp_path / "painted.png"))
    drawings, own_generate = [], studio.generate
    monkeypatch.setattr(studio, "generate", lambda *values: drawings.append(values[-1]) or own_generate(*values))
    find("#draw").click()
    wait_for(lambda: value_of("#edit-line textarea, #edit-line input").startswith("done: class one"))
    wait_for(lambda: find("#edited img").get_attribute("src"))
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    browser.save_screenshot(str(tmp_path / "edited.png"))
    image, mask = read_drawing(drawings[0], 64)
    chosen = token_mask(mask, 64, 4).view(4, 4)
    assert chosen[1, 1] and not chosen[0].any() and not chosen[:, 3].any(), "the stroke went through the middle"
    first = generate(studio.model, studio.vae, [1], seed=5, cfg=2.0, temperature=0.9, num_iter=3)[0]
    assert np.array_equal(np.asarray(image), np.asarray(first)), (
        "what was taken is the first picture, unharmed by its way through the page"
    )
    anew = generate(studio.model, studio.vae, [1], seed=5, cfg=2.0, temperature=0.9, num_iter=3, init=image, mask=mask)[
        0
    ]
    assert np.array_equal(picture("#edited img"), np.asarray(enlarge(anew)))
    assert browser.get_log("browser") == [] or all(
        entry["level"] != "SEVERE" or "favicon" in entry["message"] for entry in browser.get_log("browser")
    )
    outside = [
        url
        for url in browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        if "127.0.0.1" not in url
    ]
    assert not [url for url in outside if url.startswith("http")], "the page asks other machines for nothing"
