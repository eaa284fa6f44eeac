"""The page of a run: what is in it, that it needs nothing else, and how a browser shows it."""

import base64
import functools
import json
import logging
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from igpt.metric.result import Curve, Grid, Number, Result
from igpt.report import page as page_module
from igpt.report.page import render_page, write_page
from igpt.report.plots import MOST_POINTS, build_plots, thin
from igpt.report.style import css_variables
from igpt.report.summary import summarize
from igpt.report.sweep_report import write_comparison as sweep_page
from igpt.run.launch import launch
from igpt.utils import files
from tests.configs import CONF
from tests.report.records import HOSTILE, LINKING, NAMES, Page, classified, finished, loss, made

WEB = Path(page_module.__file__).parent / "web"


ROW = re.compile(
    r'<tr><th scope="row">([^<]+)<code>(.+?)</code></th><td class="value">(.+?)</td><td class="value">(.+?)</td>'
)


def test_every_number_and_every_point_of_a_curve_is_there(quickstart: Path) -> None:
    """Independent source: result.json: values to four digits, intervals to three, shares in percent; each with a name.

    Every run and stage has left its page.
    """
    for folder in (quickstart, *quickstart.glob("[1-8]_*")):
        record = json.loads((folder / "result.json").read_text())
        page = Page(folder / "report.html")
        rows = {key: of for *of, key in map(_read_row, ROW.findall((folder / "report.html").read_text()))}
        assert rows.keys() == record["numbers"].keys()
        for key, number in record["numbers"].items():
            name, (value, *ends), n = rows[key]
            assert name not in key
            scale = 100 if number["unit"] == "share" else 1
            assert value == pytest.approx(scale * number["value"], rel=5e-4, abs=0.051 if scale > 1 else 5.1e-5)
            interval = number["interval"]
            if interval is None and number["stderr"] is not None:
                interval = [number["value"] + side * 1.96 * number["stderr"] for side in (-1, 1)]
            assert ends == pytest.approx([scale * end for end in interval or ()], rel=5.1e-3, abs=0.051)
            assert n == number["n"]
            assert number["features"] in page.text
        lines = {tag["data-key"]: tag for tag in page.all("g")}
        drawn = {key: curve for key, curve in record["curves"].items() if key in lines}
        assert {key for key, curve in record["curves"].items() if len(curve["x"]) > 1} <= drawn.keys()
        for key, curve in drawn.items():
            assert [float(x) for x in lines[key]["data-x"].split()] == pytest.approx(curve["x"])
            assert [float(y) for y in lines[key]["data-y"].split()] == pytest.approx(curve["y"], rel=1e-5)
        assert record["versions"]["torch"] in page.text
        assert record["commit"].removesuffix("-dirty") in page.text


def _read_row(cells: tuple[str, ...]) -> tuple[str, list[float], int, str]:
    """(name, value and ends of its interval, n, key) of a row of numbers."""
    name, key, value, n = cells
    figures = re.findall(r"-?[\d,]*\.?\d+(?:e[+-]?\d+)?", value)
    plain = [float(figure.replace(",", "")) for figure in figures]
    return name, plain if "[" in value else plain[:1], int(n.replace(",", "")), key.replace("<wbr>", "")


def test_part_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", Result()).path
    (part := folder / ".report.html.abcdefgh.part").touch()
    render_page(folder)
    assert not part.exists()


def test_fits_that_did_not_converge_are_shown(tmp_path: Path) -> None:
    """Invariant: a probe's page names them, escaped; a page without any has no such line."""
    text = "probe, layer 3, C = 100: up to 2.1e-04 nats"
    results = Result(provenance={"not_converged": [text, "<b>"]}), Result(provenance={"suboptimality": 1e-7})
    runs = (finished(tmp_path / str(i), result, task="probe") for i, result in enumerate(results))
    shown, plain = (Page(render_page(run.path)) for run in runs)
    assert f"Not fitted to their optimum: {text}; <b>." in shown.text
    assert "b" not in {tag for tag, _ in shown.tags}
    assert "Not fitted" not in plain.text


def test_lines_go_through_their_points() -> None:
    """By hand: the drawing is 1,000 wide and high from the top left, with 2 % and 6 % of room on each side."""
    (plot,) = build_plots(
        {"a": Curve([0.0, 50.0, 100.0], [1.0, 2.0, 1.5], "step", "nats"), "b": Curve([0.0], [1.0], "s", "")}
    )
    x = [1000 * (place + 0.02) / 1.04 for place in (0, 0.5, 1)]
    y = [1000 * (1 - (place + 0.06) / 1.12) for place in (0, 1, 0.5)]
    assert np.asarray(plot.lines[0].points) == pytest.approx(np.transpose([x, y]), abs=0.06)
    assert plot.x_ticks[0] == (pytest.approx(100 * 0.02 / 1.04, abs=0.01), "0")
    assert plot.rows == [("0", ["1"]), ("50", ["2"]), ("100", ["1.5"])]


def test_a_long_curve_keeps_its_ends_and_extremes(tmp_path: Path) -> None:
    """Invariant: what is left out is said, and no peak is."""
    y = np.random.default_rng(0).normal(size=30_000).tolist()
    y[12_345], y[20_001] = 9.0, -9.0
    kept = thin(y, MOST_POINTS)
    assert {0, 12_345, 20_001, 29_999} <= set(kept)
    assert len(kept) <= MOST_POINTS + 2
    curve = Curve([float(step) for step in range(30_000)], y, "step", "nats")
    page = Page(render_page(finished(tmp_path / "run", Result(curves={"train/loss_gen": curve})).path))
    assert f"({len(kept):,} of 30,000 points drawn)" in page.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # 99 names below a plot
def test_many_curves_leave_the_page_small(tmp_path: Path) -> None:
    """Invariant: below 5 MB, however many there are."""
    x = [float(step) for step in range(3000)]
    curves = {
        f"run {i}": Curve(x, np.random.default_rng(i).normal(size=3000).tolist(), "step", "nats") for i in range(99)
    }
    assert render_page(finished(tmp_path / "run", Result(curves=curves)).path).stat().st_size < 5_000_000


def test_whatever_it_is_given_comes_out_as_text(tmp_path: Path) -> None:
    """Invariant: names and values from config and result are shown as they are, and make no tag and no attribute."""
    result = Result(
        numbers={HOSTILE: Number(1.5, HOSTILE, 3, features=HOSTILE)},
        curves={HOSTILE: Curve([0.0, 1.0], [0.0, 1.0], HOSTILE, HOSTILE)},
        files={HOSTILE: Path(f"{HOSTILE.replace('/', '')}.png")},
        provenance={HOSTILE: HOSTILE},
    )
    config: dict[str, Any] = {
        "data": {"name": HOSTILE, "resolution": 8, "path": HOSTILE},
        "published": [HOSTILE],
        "init": HOSTILE,
        "task": {"name": "pipeline", "requires": [], "stages": {"a": {"run": "gone", HOSTILE: HOSTILE}}},
        HOSTILE: {HOSTILE: HOSTILE},
    }
    path = render_page(finished(tmp_path / "run", result, config, task="pipeline").path)
    plain = render_page(finished(tmp_path / "plain", Result(curves=result.curves)).path)
    page = Page(path)
    assert page.text.count(HOSTILE) >= 12
    assert not page.all("img")
    assert len(page.all("script")) == 1
    known = {key for tag in Page(plain).tags for key in tag[1]} | {"open", "class", "href", "id"}
    assert {key for tag in page.tags for key in tag[1]} <= known
    numbers = {HOSTILE: Number(1.5, HOSTILE, 3)}
    runs = [made(tmp_path / name, numbers, model__name=name) for name in ("<b>", "&lt;")]
    compared = Page(sweep_page(tmp_path / "c.html", [summarize([*runs, tmp_path / "<i>"], HOSTILE)], command=HOSTILE))
    assert compared.text.count(HOSTILE) == 2 + 2 + 1 + 1  # title and heading, table, picture, command
    assert all(compared.text.count(name) for name in ("model=<b>", "model=&lt;", "<i>"))
    assert len(compared.all("script")) == 1
    assert not compared.all("img")


def test_a_page_needs_nothing_but_itself(pipeline: Path) -> None:
    """Invariant: pictures are in it; links lead within it, or to other pages of the run, which are there."""
    page = Page(pipeline / "report.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [(tag, value) for tag, attributes in page.tags for key, value in attributes.items() if key in LINKING]
    for tag, value in links:
        if tag == "img":
            assert value.startswith("data:image/png;base64,")
        elif value.startswith("#"):
            assert value[1:] in ids
        else:
            assert tag == "a"
            assert (pipeline / unquote(value)).is_file()
    assert {value for tag, value in links if tag == "a" and not value.startswith("#")} == {
        f"{stage.name}/report.html" for stage in pipeline.glob("[1-8]_*")
    }
    for stage in pipeline.glob("[1-8]_*"):
        assert {tag["href"] for tag in Page(stage / "report.html").all("a")} == {"../report.html"}
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "form", "audio", "video"}
    style = (WEB / "style.css").read_text() + (WEB / "hover.js").read_text()
    assert not re.search(r"url\(|@import|https?:|fetch|XMLHttp|import\(|innerHTML", style)
    assert all(tag["alt"] for tag in page.all("img"))
    assert len(page.all("h1")) == 1


def test_the_pictures_of_a_run_are_in_its_page(pipeline: Path) -> None:
    """Round trip: the data of every picture is the file's, but for the curves, which are drawn anew."""
    record = json.loads((pipeline / "result.json").read_text())
    expected = {path for path in record["files"].values() if path.endswith(".png") and "curves" not in path}
    shown = [base64.b64decode(tag["src"].partition(",")[2]) for tag in Page(pipeline / "report.html").all("img")]
    assert sorted(shown) == sorted((pipeline / path).read_bytes() for path in expected)
    pretrained = Page(pipeline / "2_pretrain" / "report.html")
    samples = [*(pipeline / "2_pretrain" / "samples").glob("step_*.png")]
    by_position = [*(pipeline / "2_pretrain" / "loss_by_position").glob("step_*.png")]
    assert (len(pretrained.all("img")), len(samples), len(by_position)) == (3, 2, 1)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"version": 1, "task": "sample"}', None, "names"],
    ids=["cut short", "a list", "without numbers", "curves of text", "classes of numbers"],
)
def test_a_damaged_result_is_an_error_and_no_end_of_a_run(
    content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished(tmp_path / "run", Result(curves={"a": Curve([1.0, 2.0], [1.0, 2.0], "x", "y")}))
    place = folder.path / "result.json"
    if content in (None, "names"):
        record = folder.read_result()
        record["curves"]["a"]["y"] = ["1", "2"] if content is None else [1, 2]
        record["class_names"] = {"confusion": [1, 2] if content == "names" else ["a", "b"]}
        content = json.dumps(record)
    place.write_text(content)
    with pytest.raises(ValueError, match=r"result\.json.*(damaged|another version)"):
        render_page(folder.path)
    with caplog.at_level(logging.WARNING):
        write_page(folder.path)
    assert "report.html: " in caplog.text


def test_what_was_not_written_is_on_the_page(tmp_path: Path) -> None:
    """Invariant: the file and the error, as text, under their heading; no heading where all was written."""
    grids = {"<b>": Grid(np.zeros(3)), "samples": Grid(np.zeros((1, 1, 4, 4, 3), np.uint8))}
    text = render_page(finished(tmp_path / "run", Result(grids=grids)).path).read_text()
    section = text.partition('<section id="not-written">')[2].partition("</section>")[0]
    assert re.search(r"&lt;b&gt;.*png", section)
    assert "ValueError" in section
    assert "<b>" not in text
    grids.pop("<b>")
    assert "not-written" not in render_page(finished(tmp_path / "other", Result(grids=grids)).path).read_text()


def test_a_run_ends_well_without_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant: whatever happens while it is written, only that is logged; an older page stays as it was."""
    folder = finished(tmp_path / "run", Result(numbers={"a": Number(1.0, "b", 1)}))
    before = render_page(folder.path).read_bytes()
    monkeypatch.setattr(page_module, "embed", lambda *_, **__: [].pop())
    with caplog.at_level(logging.WARNING):
        write_page(folder.path)
    assert "report.html: " in caplog.text
    assert (folder.path / "report.html").read_bytes() == before
    assert not list(folder.path.glob(".*.part"))


def report_task(*runs: Path) -> Result:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["task=report", f"task.runs=[{','.join(map(str, runs))}]"])
    return launch(cfg, choices={}, overrides=[])


def test_pages_of_old_runs_are_written_anew(pipeline: Path, tmp_path: Path) -> None:
    """Invariant: task=report leaves the page that the run left, also of each stage, and no folder of its own."""
    place = tmp_path / pipeline.name
    shutil.copytree(pipeline, place)
    before = {path: path.read_text() for path in place.rglob("report.html")}
    assert len(before) == 9
    for path in before:
        path.unlink()
    report_task(place)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    for path, text in before.items():  # told from where each was written
        texts = [of.replace(str(place), "RUN").replace(f"runs/{place.name}", "RUN") for of in (path.read_text(), text)]
        assert texts[0] == texts[1]


def test_task_report_names_every_bad_run(tmp_path: Path) -> None:
    """Invariant: nothing is written when one of them is none."""
    good = finished(tmp_path / "good", Result()).path
    files.write_json(finished(tmp_path / "old", Result()).path / "result.json", {"version": 99})
    with pytest.raises(ValueError, match=r"nowhere: this is no run folder; .*old.*another version"):
        report_task(good, tmp_path / "nowhere", tmp_path / "old")
    assert not (good / "report.html").exists()
    with pytest.raises(ValueError, match=r"task\.runs=\[RUN_FOLDER"):
        report_task()


def test_colours_are_told_apart_in_light_and_dark() -> None:
    """Independent source: WCAG 2.2, 1.4.3 and 1.4.11: 4.5 to 1 for text, 3 to 1 for lines."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", css_variables(theme))) for theme in ("light", "dark"))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for scheme in (light, dark):
        for name in ("ink", "muted", "link", *(f"c{i}" for i in range(8))):
            for behind in ("paper", "card"):
                high, low = sorted((luminance(scheme[name]), luminance(scheme[behind])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= (3 if name.startswith("c") else 4.5)


LOOK = """
<body><script>
const frames = [...document.querySelectorAll("iframe")];
const addresses = %s;
const found = {};
let left = 0;
for (const [name, sandbox] of [["plain", null], ["no_script", "allow-same-origin"]])
  for (const [i, address] of addresses.entries()) {
    const frame = document.createElement("iframe");
    left++;
    frame.width = 375;
    frame.height = 800;
    if (sandbox) frame.setAttribute("sandbox", sandbox);
    frame.onload = async () => {
      const page = frame.contentDocument, root = page.documentElement;
      for (const details of page.querySelectorAll("details")) details.open = true;
      const images = [...page.images];
      await Promise.all(images.map((image) => image.decode().catch(() => {})));
      const area = page.querySelector(".area"), box = area && area.getBoundingClientRect();
      if (area) {
        area.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", {clientX: box.right - 1}));
        area.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {key: "ArrowLeft"}));
      }
      const tip = page.querySelector(".area .tip:not([hidden])");
      const cells = page.querySelector(".cells"), place = cells && cells.getBoundingClientRect();
      if (cells) {
        const at = {clientX: place.left + 0.25 * place.width, clientY: place.top + 0.75 * place.height};
        cells.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
        cells.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {key: "ArrowDown"}));
      }
      const cell = page.querySelector(".cells .tip:not([hidden])");
      found[`${name} ${i}`] = {
        images: images.length, loaded: images.filter((image) => image.naturalWidth > 0).length,
        room: root.clientWidth, wide: root.scrollWidth, height: root.scrollHeight,
        crisp: images.filter((image) => getComputedStyle(image).imageRendering === "pixelated").length,
        tip: tip && tip.innerText, cell: cell && cell.innerText,
      };
      if (--left === 0) {
        const said = document.createElement("pre");
        said.textContent = JSON.stringify(found);
        document.body.replaceChildren(said);
      }
    };
    frame.src = address;
    document.body.append(frame);
  }
</script>
"""


@functools.cache
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("needs a headless Chromium, which is not there: apt-get install chromium (Debian's package)")


def test_a_browser_shows_it_on_a_phone(pipeline: Path, tmp_path: Path) -> None:
    """Invariant: at 375 pixels nothing is wider than the page, pictures load, hovering says values, no errors.

    The same without JavaScript, but for the hovering.
    """
    runs = [made(tmp_path / name, loss(2.0), model__name=f"{name}{'0123456789' * 4}") for name in "ab"]
    compared = sweep_page(tmp_path / "comparison.html", [summarize(runs, "val/loss_gen")], command="again " * 99)
    named = render_page(classified(tmp_path / "named", NAMES).path)
    shown = [pipeline / "report.html", *sorted(pipeline.glob("[267]_*/report.html")), compared, named]
    look = tmp_path / "look.html"
    look.write_text(LOOK % json.dumps([path.as_uri() for path in shown]))
    done = subprocess.run(
        [
            chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--allow-file-access-from-files", "--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}", look.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if "sandboxed" not in line]  # that scripts were blocked, where asked for
    match = re.search(r"<pre>(\{.*\})</pre>", done.stdout)
    assert match, done.stdout[-2000:]
    found = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert len(found) == 2 * len(shown)
    for name, seen in found.items():
        assert seen["wide"] == seen["room"] == 375, name
        assert seen["loaded"] == seen["images"], name
        assert seen["height"] > 300, name
    assert found["plain 0"]["images"] == found["no_script 0"]["images"] == 8
    assert found["plain 0"]["crisp"] == 4  # samples, completions, palette; confusion matrices are diagrams
    record = json.loads((pipeline / "2_pretrain" / "result.json").read_text())
    last = record["curves"]["train/loss_gen"]
    assert f"training loss\n{last['y'][-2]:.6g}" in found["plain 1"]["tip"].replace("\n\n", "\n")
    assert f"optimiser step {last['x'][-2]:.0f}" in found["plain 1"]["tip"]
    assert found["no_script 1"]["tip"] is None
    assert found["plain 5"]["cell"].split("\n") == [
        "class", "$x$", "taken for", "two lines", "images", "66 of 540, 12.2 %",
    ]  # fmt: skip
    assert found["no_script 5"]["cell"] is None
