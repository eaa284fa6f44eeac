"""The page of the demo, driven in headless Chromium with no other address to reach."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from igpt.app.demo_page import serve
from igpt.app.workbench import Workbench
from igpt.model.generate import Sampling
from tests.app.test_demo import build_classifier, build_uploads, build_workbench, built_demo
from tests.data.conftest import encoded, photo

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -r requirements-dev.txt")
PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
NAMES = ("<b>cat</b>", "dog", "horse\ufffd")  # of `build_classifier`, as shown
WITHOUT = "needs a browser and its driver: apt-get install chromium chromium-driver"
STATED = "return [...document.querySelectorAll('{} img')].map(i => [i.alt, i.complete && i.naturalWidth])"


@pytest.fixture
def browser() -> Iterator[Any]:
    if None in PROGRAMS.values():
        pytest.skip(WITHOUT)
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    only_here = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--window-size=1280,900", only_here):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(PROGRAMS["chromedriver"])
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Workbench]]:
    """The address of the page of a small network that draws slowly enough to be watched."""
    draw = Sampling.draw

    def slowly(*given: Any) -> Any:
        time.sleep(0.02)
        return draw(*given)

    monkeypatch.setattr(Sampling, "draw", slowly)
    build = built_demo(tmp_path)
    bench = build_workbench(build, build_classifier(build))
    about = {"weights": "here/<b>model</b>"}
    with serve(bench, about, build_uploads(tmp_path)) as url:
        yield url, bench
        bench.stop()


def until(look: Callable[[], Any], seconds: float = 20) -> Any:
    """What `look` gives, as soon as it is something."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return seen


@pytest.mark.usefixtures("random_state")
def test_the_page(browser: Any, served: tuple[str, Workbench], tmp_path: Path) -> None:
    """An image is completed row by row, stopped, uploaded, looked up; refusals are said; nothing else is asked for."""

    def click(selector: str) -> None:
        browser.execute_script(f"document.querySelector('{selector}').click()")

    def text(selector: str) -> str:
        found: str = browser.execute_script(f"return document.querySelector('{selector}')?.innerText || ''")
        return found

    def images(selector: str) -> dict[str, int]:
        return dict(browser.execute_script(STATED.format(selector)))

    def find_names() -> list[str]:
        return [name for line in text("#classes").splitlines() if (name := line.strip()) in NAMES][-3:]

    address, bench = served
    first, second = (f"val image {chosen.index}" for chosen in bench.choices(0, 2))
    browser.get(address)
    until(lambda: text("#complete"))
    assert until(lambda: images("#given")) == {first: 8, "given": 8}
    assert browser.execute_script("return document.querySelectorAll('#choices button img').length") == 6
    assert "here/<b>model</b>" in text(".facts")
    classes = [list(bench.classify(chosen)) for chosen in bench.choices(0, 2)]
    assert find_names() == classes[0]

    browser.execute_script(
        "window.said = []; new MutationObserver(() => window.said.push(document.querySelector('#said').innerText))"
        ".observe(document.querySelector('#said'), {childList: true, subtree: true, characterData: true})"
    )
    click("#complete")
    until(lambda: text("#said").startswith("All 8 rows are there"))
    rows = [
        int(found[1])
        for message in browser.execute_script("return window.said")
        if (found := re.match(r"Row (\d)", message))
    ]
    assert rows == sorted(rows)
    assert len({*rows} & {3, 4, 5, 6, 7}) >= 3  # they were seen to appear
    assert images("#drawn") == {"completion 1": 8, "completion 2": 8}

    click("#complete")
    until(lambda: text("#said").startswith("Row 3"))
    click("#stop")
    until(lambda: text("#said") == "Stopped.")
    browser.execute_script("document.querySelectorAll('#choices .thumbnail-item')[1].click()")
    until(lambda: images("#given") == {second: 8, "given": 8})
    assert images("#drawn") == {}
    until(lambda: find_names() == classes[1])
    click("#complete")  # and, while it draws, another choice
    until(lambda: text("#said").startswith("Row 3"))
    browser.execute_script("document.querySelectorAll('#choices .thumbnail-item')[0].click()")
    until(lambda: images("#given") == {first: 8, "given": 8})
    time.sleep(0.3)
    assert images("#drawn") == {}
    assert text("#said") == f"{first} is chosen."

    (field,) = browser.find_elements("css selector", "input[type=file]")
    (tmp_path / "wide.png").write_bytes(encoded(photo(2, 90, 40), "PNG"))
    (tmp_path / "none.png").write_text("no image")
    field.send_keys(str(tmp_path / "wide.png"))
    until(lambda: "Your image was cut" in text("#said"))
    assert images("#given") == {"your image": 8, "given": 8}
    assert images("#drawn") == {}
    field.send_keys(str(tmp_path / "none.png"))
    until(lambda: "cannot be read as an image: its 8 bytes are no image" in text("#said"))
    assert not list((tmp_path / "page" / "uploads").rglob("*.png"))

    click("#find")
    until(lambda: text("#about-found") == "Layer 1, among 40 training images.")
    assert list(images("#found").values()) == [8] * 4

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    assert until(lambda: browser.execute_script("return document.documentElement.scrollWidth")) <= 360

    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    requested = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [a["params"]["request"]["url"] for a in requested if a["method"] == "Network.requestWillBeSent"]
    assert len(addresses) > 10
    assert [a for a in addresses if not a.startswith((address, "data:", "blob:", "chrome"))] == []
