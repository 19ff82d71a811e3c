"""The web page: what it asks for, its server's limits, and the page in a headless browser (slow; needs Chromium and
selenium).
"""

import base64
import contextlib
import http.client
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.images import center_crop_adm
from demo.app import main, read_names
from demo.server import MAX_BODY, MAX_WAITING, Server
from demo.studio import DATA_URL, NONE, Studio, data_url, read_picture, strip_steps, unique_names
from generation import Pipeline
from tests.helpers import photographs, tiny_model, tiny_vae

REQUEST = {"class": 1, "seed": 5, "guidance": 2, "temperature": 0.9, "steps": 3, "pictures": 2, "order": "random"}
OPTIONS = dict(seed=5, cfg=2.0, temperature=0.9, num_iter=3)  # the same, for the pipeline


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(Pipeline(tiny_model(), tiny_vae().requires_grad_(False)), ["zero", "<b>one</b>"])


def pixels(url: str) -> np.ndarray:
    """What a data URL shows."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix(DATA_URL)))))


def assert_pictures(urls: list[str], images: list[Image.Image]) -> None:
    """The data URLs show the images."""
    assert len(urls) == len(images)
    assert all(np.array_equal(pixels(url), np.asarray(image)) for url, image in zip(urls, images, strict=True))


# ---- what the page asks for


@pytest.mark.parametrize(("value", "number"), [(1, 1), (NONE, None)])
def test_the_last_pictures_are_those_of_the_pipeline(studio: Studio, value: object, number: int | None) -> None:
    *steps, last = studio.generate(REQUEST | {"class": value, "watch": True})
    assert_pictures(last["images"], studio.pipeline.generate([number] * 2, **OPTIONS))
    assert [(s["step"], s["known"]) for s in steps] == [(1, 3), (2, 8), (3, 16)]
    assert all((s["steps"], s["tokens"]) == (3, 16) for s in steps)
    assert (pixels(steps[0]["images"][0]) == 128).mean() > 0.5  # most tokens are grey after the first step
    assert [s.get("strip") for s in steps] == [True, True, None] and last["done"]
    assert last["class"] == ("no class" if number is None else "class 1 = '<b>one</b>'")
    assert not any("images" in s for s in [*studio.generate(REQUEST)][:-1]), "images of steps only if asked for"


def test_only_the_chosen_tokens_are_regenerated(studio: Studio) -> None:
    picture, mask = center_crop_adm(Image.fromarray(photographs()[0]), 64), np.zeros((4, 4), bool)
    mask[:2, :2] = True
    edit = {"image": data_url(picture), "tokens": [0, 1, 4, 5]}
    *_, last = studio.generate(REQUEST | edit)
    assert_pictures(last["images"], studio.pipeline.generate([1] * 2, init=picture, mask=mask, **OPTIONS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": None}, "seed is empty: enter a whole number from 0 to"),
        ({"steps": ""}, "steps is empty"),
        ({"guidance": None}, "guidance is empty: enter a number from 1 to 8"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"seed": "7"}, "seed must be"),
        ({"pictures": True}, "pictures must be a whole number from 1 to 16"),
        ({"pictures": 17}, "from 1 to 16, got 17"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 1.5"),
        ({"steps": 1e9}, "steps must be a whole number from 1 to 64"),
        ({"class": None}, "class must be a number from 0 to 9, or none"),
        ({"class": 10}, "class must be"),
        ({"class": "zero"}, "class must be"),
        ({"order": "spiral"}, "order"),
        ({"image": None, "tokens": [0]}, "no picture to edit"),
        ({"tokens": [0]}, "no picture to edit"),
        ({"image": data_url(Image.new("RGB", (64, 64))), "tokens": []}, "nothing is chosen"),
        ({"image": data_url(Image.new("RGB", (64, 64))), "tokens": [16]}, "numbers from 0 to 15"),
        ({"image": data_url(Image.new("RGB", (32, 64))), "tokens": [0]}, "32 x 64 pixels, the model makes 64 x 64"),
        ({"image": DATA_URL + "AAAA", "tokens": [0]}, "it is no picture"),
    ],
)
def test_settings_that_do_not_fit(studio: Studio, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        next(studio.generate(REQUEST | changes))


def test_names_are_unique(studio: Studio) -> None:
    assert unique_names(["cat", "dog", "cat"]) == ["cat (1)", "dog", "cat (2)"]
    assert unique_names(["cat", "cat (1)", "cat"]) == ["cat (2)", "cat (1)", "cat (3)"]
    assert unique_names(["no class"]) == ["no class (1)"]
    classes = studio.about()["classes"]
    assert classes[:3] == [(0, "zero"), (1, "<b>one</b>"), (2, "class 2")] and classes[-1] == (NONE, "no class")
    assert len(classes) == 11 and json.dumps(studio.about())


def test_pictures_that_are_uploaded(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    photo, file, exif = Image.fromarray(photographs()[0]), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # stored sideways
    photo.save(file, format="PNG", exif=exif)
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(pixels(studio.crop(file.getvalue())["image"]), np.asarray(center_crop_adm(upright, 64)))
    for content, words in ((b"", "it is no picture"), (file.getvalue()[:999], "cannot be read as a picture")):
        with pytest.raises(ValueError, match=words):
            read_picture(content)
    monkeypatch.setattr("demo.studio.MAX_PIXELS", 640 * 427 - 1)
    with pytest.raises(ValueError, match="427 x 640 pixels are too many|640 x 427 pixels are too many"):
        read_picture(file.getvalue())


@pytest.mark.parametrize(("steps", "shown"), [(1, {0}), (3, {0, 1, 2}), (64, {0, 9, 18, 27, 36, 45, 54, 63})])
def test_steps_of_the_strip(steps: int, shown: set) -> None:
    assert strip_steps(steps) == shown


def test_class_names_from_a_file(tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}')
    assert read_names(str(names)) == ["tench", "goldfish"]
    names.write_text('{"1": "one"}')
    with pytest.raises(ValueError, match=r"names\.json \(--names\) holds no class names"):
        main(["--names", str(names)])


# ---- the server


@contextlib.contextmanager
def serving(studio: Studio, host: str = "127.0.0.1") -> Iterator[Server]:
    """A running server on a free port."""
    with Server(host, 0) as server:
        server.studio = studio
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(studio: Studio) -> Iterator[Server]:
    with serving(studio) as running:
        yield running


def ask(server: Server, path: str, body: object = None, **headers: str) -> http.client.HTTPResponse:
    """The answer to GET, or to POST of a body."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, None if body is None else content, headers)
    return connection.getresponse()


def events(answer: http.client.HTTPResponse) -> Iterator[dict]:
    """The lines of /generate."""
    return map(json.loads, answer)


def test_requests_of_the_page(server: Server, studio: Studio) -> None:
    for path in ("/?class=3", "/page.js", "/page.css"):
        answer = ask(server, path)
        assert answer.status == 200 and answer.read()
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Access-Control-Allow-Origin"] is None
    assert json.load(ask(server, "/about")) == json.loads(json.dumps(studio.about() | {"upload": MAX_BODY}))
    *_, last = events(ask(server, "/generate", REQUEST))
    assert_pictures(last["images"], studio.pipeline.generate([1] * 2, **OPTIONS))
    assert [*events(ask(server, "/generate", REQUEST | {"seed": None}))][0]["error"].startswith("seed is empty")
    for body in (b"x", b"[" * 100_000, b"[]", b"\xff"):
        assert "no JSON" in [*events(ask(server, "/generate", body))][0]["error"]
    picture = json.load(ask(server, "/crop", b"text"))
    assert picture["error"] == "the file cannot be read as a picture: it is no picture"
    assert (ask(server, "/../app.py").status, ask(server, "/other", {}).status) == (404, 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "LOCALHOST:9000"}, 200),  # a forwarded port
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:7860"}, 403),
        ({"Host": "["}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:7860", "Origin": "http://localhost:7860"}, 200),
        ({"Host": "localhost:7860", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:7860", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:7860", "Origin": "null"}, 403),
    ],
)
def test_other_hosts_and_origins_are_refused(server: Server, headers: dict, status: int) -> None:
    for path, body in (("/about", None), ("/crop", b"")):
        answer = ask(server, path, body, **headers)
        assert answer.status == (status if body is None or status != 200 else 400)
        assert status == 200 or json.load(answer)["error"].startswith("this page answers as 127.0.0.1 only")


def test_uploads_have_a_limit(server: Server) -> None:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    too_large = (MAX_BODY + 1, 413, "too large: at most 10 MB")
    for length, status, words in (too_large, ("x", 411, "how long it is"), ("9" * 5000, 411, "how")):
        connection.putrequest("POST", "/crop")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == status and words in json.load(answer)["error"]
        connection.close()


def wait_for(what: Callable[[], object], seconds: float = 60):
    """The first true value of what(), called repeatedly; elements that the page replaced meanwhile count as false."""
    end = time.monotonic() + seconds
    while True:
        try:
            value = what()
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "selenium":
                raise
            value = None
        if value:
            return value
        assert time.monotonic() < end, "it did not get there in time"
        time.sleep(0.05)


def test_the_queue_is_short_and_closed_pages_leave_it(
    server: Server, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_steps, go, steps = studio.pipeline.generate_steps, threading.Event(), []

    def slow(*args: object, **options: object) -> Iterator:
        for step in generate_steps(*args, **options):
            yield step
            steps.append(step)
            assert go.wait(60)

    monkeypatch.setattr(studio.pipeline, "generate_steps", slow)
    running = ask(server, "/generate", REQUEST | {"steps": 60, "pictures": 1})
    assert next(events(running))["step"] == 1
    waiting = [ask(server, "/generate", REQUEST) for _ in range(MAX_WAITING)]
    wait_for(lambda: len(server.turns.jobs) == MAX_WAITING + 1)
    assert next(events(ask(server, "/generate", REQUEST)))["error"].startswith(f"{MAX_WAITING} others are waiting")
    for answer in waiting[1:]:
        answer.close()
    wait_for(lambda: len(server.turns.jobs) == 2)
    running.close()
    go.set()
    *_, last = events(waiting[0])
    assert last["done"] and len(steps) <= 2 + 3, "one job stopped at its second step, the other has three"
    wait_for(lambda: not server.turns.jobs)


def test_connections_have_a_limit(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.server.MAX_CONNECTIONS", 1)
    with serving(studio) as server:
        with socket.create_connection(server.server_address[:2], 60):
            wait_for(lambda: not server.places._value)
            with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
                ask(server, "/about")
        wait_for(lambda: server.places._value)
        assert ask(server, "/about").status == 200


def test_a_failure_is_one_sentence(
    server: Server, studio: Studio, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr(studio.pipeline, "generate_steps", lambda *_, **__: 1 / 0)
    assert [*events(ask(server, "/generate", REQUEST))] == [
        {"error": "this failed (ZeroDivisionError): the terminal of demo.app says more"}
    ]
    assert messages == ["a request of the page failed: ZeroDivisionError: division by zero"]


def test_addresses(studio: Studio, server: Server) -> None:
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}" and server.server_address[1] > 0
    for port, where in ((server.server_address[1], rf"127\.0\.0\.1:{server.server_address[1]}"), (70000, ".*:70000")):
        with pytest.raises(ValueError, match=rf"cannot serve at {where} \(--host, --port\)"):
            main(["--resume", "nowhere", "--port", str(port)])  # before the model is looked for
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 on this machine")
    with serving(studio, "::1") as v6:
        assert v6.url.startswith("http://[::1]:")
        assert ask(v6, "/about").status == 200 and ask(v6, "/about", Host="evil.example").status == 403


# ---- the page in a browser


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
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.mark.slow
def test_the_page_in_a_browser(studio: Studio, server: Server, browser, tmp_path: Path) -> None:
    """Generate by keyboard, open the link, edit by mouse and by keyboard, upload, errors; at two widths.

    Pixels are compared with the pipeline's.
    """
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(css: str):
        return browser.find_element(By.CSS_SELECTOR, css)

    def sources(panel: str) -> list[str]:
        return [img.get_attribute("src") for img in browser.find_elements(By.CSS_SELECTOR, f"#{panel} .gallery img")]

    def done(words: str = "done: class 1 = '<b>one</b>', seed 5") -> bool:
        return find("#line").text.startswith(words)

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    # a link fills the form and generates; its values are what the pipeline is asked for
    expected = studio.pipeline.generate([1] * 2, **OPTIONS)
    query = "class=1&order=random&seed=5&guidance=2&temperature=0.9&steps=3&pictures=2"
    browser.get(f"{server.url}/?{query}")
    wait_for(done)
    assert_pictures(sources("generate"), expected)
    captions = [caption.text for caption in browser.find_elements(By.CSS_SELECTOR, "#generate .gallery figcaption")]
    assert [caption.split("\n")[0] for caption in captions] == ["0 · <b>one</b>", "1 · <b>one</b>"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#generate .strip img")) == 3
    assert find("progress").get_attribute("value") == "1"
    # by keyboard, from the first field to Enter; the address follows
    browser.get(server.url)
    wait_for(lambda: find("[name=class]").get_attribute("value") == "0")
    find("[name=class]").send_keys("<b>")
    seed = find("[name=seed]")
    seed.send_keys(Keys.CONTROL, "a")
    seed.send_keys("5")
    find("[name=steps]").send_keys(Keys.HOME, Keys.RIGHT, Keys.RIGHT)
    find("[name=pictures]").send_keys(Keys.HOME, Keys.RIGHT, Keys.ENTER)
    wait_for(done)
    assert_pictures(sources("generate"), expected)
    assert browser.current_url == find("#link").get_attribute("value") == f"{server.url}/?{query}"
    find("#copy").click()
    wait_for(lambda: done("the link is copied"))
    # the first picture to the editor; paint two cells, unpaint none, then one more by keyboard
    find("#generate .gallery button").click()
    canvas = wait_for(lambda: find("#canvas").is_displayed() and find("#canvas"))
    side = canvas.size["width"]
    start = ActionChains(browser).move_to_element_with_offset(canvas, -side // 3, -side // 3).click_and_hold()
    start.move_by_offset(side // 4, 0).release().perform()
    press(Keys.ARROW_DOWN, " ")
    assert "3 of 16 tokens" in canvas.get_attribute("aria-label")
    find("#go").click()
    wait_for(done)
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = mask[1, 1] = True
    assert_pictures(sources("edit"), studio.pipeline.generate([1] * 2, init=expected[0], mask=mask, **OPTIONS))
    # an upload, one half of it
    photo = Image.fromarray(photographs()[0])
    photo.save(tmp_path / "photo.png")
    find("#upload").send_keys(str(tmp_path / "photo.png"))
    wait_for(lambda: done("the middle square"))
    find("#regions [value=left]").click()
    find("#go").click()
    wait_for(done)
    mask = np.repeat([[True, True, False, False]], 4, axis=0)
    photo = center_crop_adm(photo, 64)
    assert_pictures(sources("edit"), studio.pipeline.generate([1] * 2, init=photo, mask=mask, **OPTIONS))
    # errors are sentences
    (tmp_path / "text.png").write_text("text")
    find("#upload").send_keys(str(tmp_path / "text.png"))
    wait_for(lambda: find("#error").text == "the file cannot be read as a picture: it is no picture")
    find("[name=seed]").clear()
    find("#go").click()
    wait_for(lambda: find("#error").text.startswith("seed is empty: enter a whole number from 0 to 9,007"))
    # both tabs at a phone's width, without scrolling sideways
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", dict(width=360, height=740, deviceScaleFactor=2, mobile=True)
    )
    for tab in ("generate", "edit"):
        find(f"#tab-{tab}").click()
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
        assert find(f"#{tab} .gallery img").size["width"] > 140, "two pictures in a row"
    # a link of another model; stop
    browser.get(f"{server.url}/?class=99")
    wait_for(lambda: find("#error").text == "the link has class 99, which this page does not take")
    browser.get(f"{server.url}/?{query.replace('steps=3', 'steps=64').replace('pictures=2', 'pictures=16')}")
    wait_for(lambda: done("step"))
    find("#stop").click()
    wait_for(lambda: done("stopped") and not server.turns.jobs)
    assert not [entry for entry in browser.get_log("browser") if "400" not in entry["message"]]
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert requests and all(url.startswith((server.url, "data:")) for url in requests)
