"""The demo without a browser: what it draws and finds, what it refuses, and that it is served to this machine alone."""

import logging
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from PIL import Image

from igpt.app import demo
from igpt.app.demo_guard import UploadFolder
from igpt.app.demo_page import DemoPage
from igpt.app.nearest import TrainingFeatures
from igpt.app.workbench import MEBIBYTE, Workbench
from igpt.checkpoint.classifier import Classifier
from igpt.data.crop import Crop
from igpt.metric.result import Number, Result
from igpt.model.features import layer_features
from igpt.model.generate import Sampling
from igpt.model.head import ProbeHead
from igpt.report.folder import RunFolder
from igpt.run.components import Components
from igpt.run.execute import stage_runner
from igpt.run.launch import launch
from igpt.settings.generation import CompleteSettings, DemoSettings
from igpt.settings.probing import FeatureSettings
from igpt.task import complete
from igpt.task.complete import HIDDEN
from igpt.task.feature_reader import FeatureReader
from igpt.training.trainer import Runner
from tests.configs import CONF, built, save_small
from tests.data.conftest import claimed_png, encoded, photo

LAYERS = 3  # of save_small's network


def built_demo(place: Path, *overrides: str, **saved: Any) -> Components:
    """The demo of a small network with drawn weights, on the digits."""
    init = place / "run"
    if not init.is_dir():
        save_small(init, **saved)
    return built("task=demo", f"init={init}", f"paths.cache={place / 'cache'}", "trainer=cpu", *overrides)


def build_classifier(build: Components) -> Classifier:
    """A probe of three classes that was drawn."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, build.trained_weights.metadata.network.n_embd, generator=generator)
    head = ProbeHead(weight, torch.zeros(3), (1,), "ln_1", torch.float32)
    names = ("<b>cat</b>", "dog", "horse\u202e")
    return Classifier(head, 3, names, "toy", 1, 0, "", Path("probe.safetensors"), "probe of layer 1")


def build_workbench(build: Components, classifier: Classifier | None = None) -> Workbench:
    """The demo's parts but for its page: few images and choices, and small uploads."""
    weights = build.trained_weights
    settings = DemoSettings(
        head=None, host="127.0.0.1", port=None, threads=None, split="val", choices=6, rows=2, completions=2, at_most=3,
        temperature=1.0, top_k=None, allowed_hosts=["my-tunnel:9000"], upload_mb=1, uploads_mb=2, uploads=3,
        upload_seconds=60, upload_pixels=100_000, nearest=4, among=40, layer=1, norm="ln_1", dtype="float32",
        batch_size=16,
    )  # fmt: skip
    training = TrainingFeatures(
        weights.net().eval(), build.hardware, build.build_datamodule(), build.cache_dir, settings,
        weights=weights.sha256, cache_key=build.cache_key,
    )  # fmt: skip
    return Workbench(training, build.evaluation_crop, settings, classifier)


def build_uploads(place: Path) -> UploadFolder:
    """For the small uploads of `build_workbench`."""
    return UploadFolder(
        place / "page" / "uploads", file_bytes=MEBIBYTE, total_bytes=2 * MEBIBYTE, n_files=3, seconds=60
    )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    result = build_workbench(built_demo(tmp_path))
    yield result
    result.stop()


def neighbours(bench: Workbench, layer: int, k: int = 5) -> Any:
    return list(bench.nearest(bench.choices(0, 3)[2], layer=layer, k=k))[-1]


@pytest.mark.parametrize("layer", [0, 2, LAYERS])
def test_the_nearest_training_images(bench: Workbench, tmp_path: Path, layer: int) -> None:
    """Independent source: features and cosines computed here, image by image; read from disk the second time."""
    data, split = bench.data, bench.data.source.split("train")
    rows = data.sample_rows("train", at_most=40)
    chosen = bench.choices(0, 3)[2]

    def feature(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return layer_features(bench.net, data.encode(torch.from_numpy(pixels[None])))[layer, 0].double().numpy()

    of_train = np.stack([feature(split.read([row], [0]).pixels[0]) for row in rows])
    query = feature(chosen.pixels)
    cosines = of_train @ query / np.linalg.norm(of_train, axis=1) / np.linalg.norm(query)
    best = np.argsort(-cosines)[:5]
    images = neighbours(bench, layer)
    assert [image.index for image in images] == rows[best].tolist()
    assert [image.cosine for image in images] == pytest.approx(cosines[best], abs=1e-5)
    assert [image.label for image in images] == split.labels[rows[best]].tolist()
    assert np.array_equal(images[0].pixels, split.read([int(rows[best[0]])], [0]).pixels[0])
    again = build_workbench(built_demo(tmp_path))
    assert [image.index for image in neighbours(again, layer)] == [image.index for image in images]
    assert again.training.done == 0  # none was read anew


def test_classes_are_called_by_name(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a folder's name as text, whatever it is; the number where there is none, nothing without a label."""
    page, chosen = DemoPage(bench, build_uploads(tmp_path)), bench.choices(0, 1)[0]
    assert page.add_label("cosine 0.5", 3) == "cosine 0.5, class\N{NO-BREAK SPACE}3"  # the digits are called so
    assert page.add_label("cosine 0.5", -1) == "cosine 0.5"
    hostile = "<script>alert(1)</script>\n\u202e" + "x" * 300
    monkeypatch.setattr(type(bench.data.source), "class_names", (hostile,) * 10)
    shown = page.show_prompt(chosen, 4)
    assert "class\N{NO-BREAK SPACE}&lt;script&gt;alert(1)&lt;/script&gt; \ufffdxxxxxxxxxxxx…</small>" in shown
    *_, (found, _) = page.nearest(chosen, 1)
    assert found.count("class\N{NO-BREAK SPACE}&lt;script&gt;") == bench.settings.nearest
    assert "<script" not in shown + found
    monkeypatch.setattr(type(bench.data.source), "class_names", None)
    assert page.add_label("cosine 0.5", 3) == "cosine 0.5, label\N{NO-BREAK SPACE}3"


def test_images_are_classified(tmp_path: Path) -> None:
    """Independent source: the scores by hand, of a chosen image and of an upload; a refused upload changes nothing."""
    build = built_demo(tmp_path)
    classifier = build_classifier(build)
    bench = build_workbench(build, classifier)
    page, chosen = DemoPage(bench, build_uploads(tmp_path)), bench.choices(0, 1)[0]
    features = layer_features(bench.net, bench.data.encode(torch.from_numpy(chosen.pixels[None])))[1, 0]
    shares = (features @ classifier.head.weight.T).softmax(-1).tolist()
    shown = page._choose(chosen, 2, "")[-1]
    by_hand = dict(zip(("<b>cat</b>", "dog", "horse\ufffd"), shares, strict=True))
    assert shown == pytest.approx(by_hand, abs=1e-6)
    assert list(shown) == sorted(by_hand, key=lambda name: -by_hand[name])
    assert demo.describe_weights(build.trained_weights, classifier)["classes"] == "3, by the probe of layer 1"
    request: Any = SimpleNamespace(session_hash="a")
    assert len(page.select_upload(None, 2, request)) == len(page._choose(chosen, 2, ""))
    bench.stop()


def test_features_that_a_probe_left_are_taken(tmp_path: Path) -> None:
    """Invariant: then all training images are looked through, and none is read."""
    build = built_demo(tmp_path)
    assert build.weights is not None
    vars(build)["runner"] = Runner(machine=build.hardware, folder=tmp_path / "probing", callbacks=[])
    features = FeatureSettings(norm="ln_1", dtype="float32", batch_size=128, C_grid=[1.0])
    reader = FeatureReader(build, features)
    (full,) = reader.read(build.weights.net(), build.weights.sha256, "train", eval_masks=1)
    bench = build_workbench(build)
    neighbours(bench, 1)
    assert bench.training.done == 0
    assert bench.training.features is not None
    assert np.array_equal(bench.training.features.values, full.values)
    assert len(bench.training.rows) == 1347


def test_a_layer_that_is_not_there(bench: Workbench) -> None:
    with pytest.raises(ValueError, match=r"layers 0 .the embedding. to 3, got 4"):
        neighbours(bench, LAYERS + 1)


@pytest.mark.parametrize("permutation", [None, list(range(63, -1, -1))])
def test_completions_are_those_of_the_task(tmp_path: Path, permutation: list[int] | None) -> None:
    """Invariant: row after row the pixels of task=complete with this seed, grey where none is yet; in any order."""
    build = built_demo(tmp_path, permutation=permutation)
    bench = build_workbench(build)
    assert build.weights is not None
    settings = CompleteSettings(
        split="val", count=4, completions=3, fraction=0.5, rows=5, batch_size=64, temperature=0.9, top_k=6, top_p=None
    )
    result = complete.run(build, settings)
    grid = result.grids["completions"].images  # original, given, three completions
    by_row = {chosen.index: chosen for chosen in bench.choices(0, 1000)}
    for image, row in enumerate(result.provenance["images"]):
        chosen = by_row[row]
        assert np.array_equal(bench.show_prompt(chosen, bench.side), grid[image, 0])
        assert np.array_equal(bench.show_prompt(chosen, 5), grid[image, 1])
        drawings = list(bench.complete(chosen, rows=5, completions=3, seed=0, temperature=0.9, top_k=6))
        assert [drawing.rows for drawing in drawings] == [5, 6, 7, 8]
        end = grid[image, 2:]
        assert np.array_equal(drawings[-1].pixels, end)
        order = range(5, 8) if permutation is None else reversed(range(5, 8))
        there = [*range(5)]
        for drawing, row_drawn in zip(drawings, [None, *order], strict=True):
            there += [] if row_drawn is None else [row_drawn]
            assert np.array_equal(drawing.pixels[:, there], end[:, there])
            assert (np.delete(drawing.pixels, there, axis=1) == HIDDEN).all()


def test_what_cannot_be_drawn(bench: Workbench) -> None:
    """Each is a ValueError, which the page shows as a line."""
    settings: dict[str, Any] = {"rows": 4, "completions": 1, "seed": 0, "temperature": 1.0, "top_k": None}
    chosen = bench.choices(0, 1)[0]
    for change, message in (
        ({"completions": 4}, "1 to 3 completions"),
        ({"rows": 9}, "rows must lie in 0 … 8"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
    ):
        with pytest.raises(ValueError, match=message):
            next(bench.complete(chosen, **{**settings, **change}))


def test_a_drawing_that_is_no_longer_wanted(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: no pixel is drawn after the one at which it was stopped, by its visitor or by the demo's end."""
    drawn: list[int] = []
    draw = Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda *given: drawn.append(0) or draw(*given))
    settings: dict[str, Any] = {"rows": 4, "completions": 1, "seed": 0, "temperature": 1.0, "top_k": None}
    chosen = bench.choices(0, 1)[0]
    assert len(list(bench.complete(chosen, wanted=lambda: len(drawn) < 19, **settings))) == 1 + 2
    assert len(drawn) == 19
    steps = bench.complete(chosen, **settings)
    next(steps)
    bench.stop()
    assert list(steps) == []
    assert len(drawn) == 19


def test_choices_go_round(bench: Workbench) -> None:
    """Invariant: page after page, every held-out image comes once before the first comes again."""
    n = len(bench.split)
    seen = [chosen.index for page in range(n // 10) for chosen in bench.choices(page, 10)]
    assert n == 150
    assert sorted(seen) == list(range(n))
    assert bench.choices(n // 10, 10)[0].index == seen[0]


def upload(bench: Workbench, place: Path, data: bytes) -> np.ndarray:
    (place / "upload").write_bytes(data)
    return bench.read_upload(place / "upload").pixels


def test_an_upload_of_any_shape(bench: Workbench, tmp_path: Path) -> None:
    """Independent source: Pillow's own resizing of the square in the centre."""
    for width, height in ((64, 48), (20, 50), (31, 31), (300, 1)):
        image = photo(1, width, height)
        side = min(image.size)
        left, top = (image.size[0] - side) / 2, (image.size[1] - side) / 2
        square = image.resize((8, 8), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        assert np.array_equal(upload(bench, tmp_path, encoded(image, "PNG")), np.asarray(square))
    chosen = bench.read_upload(tmp_path / "upload")
    drawings = list(bench.complete(chosen, rows=2, completions=2, seed=0, temperature=1.0, top_k=None))
    assert drawings[-1].rows == 8
    assert np.array_equal(drawings[-1].pixels[0, :2], bench.show_prompt(chosen, bench.side)[:2])


def test_uploads_that_are_refused(bench: Workbench, tmp_path: Path) -> None:
    """Too many bytes, too many pixels, a decompression bomb, no image, a damaged one, a format that is not taken."""
    body = encoded(photo(0), "PNG")
    for data, message in (
        (body + bytes(MEBIBYTE * 11 // 10), r"The file has 1\.1 MB, at most 1 MB are taken"),
        (claimed_png(400, 300), r"The image has 400×300 pixels, at most 0\.1 million are taken"),
        (claimed_png(30_000, 30_000), "cannot be read as an image: it would unpack to more than"),
        (b"<html>404</html>", "16 bytes are no image"),
        (b"", "0 bytes are no image"),
        (body[: len(body) // 2], "damaged or cut short"),
        (encoded(photo(0).resize((9, 9)), "EPS"), "no image in one of the formats JPEG, PNG, "),
    ):
        with pytest.raises(ValueError, match=message):
            upload(bench, tmp_path, data)


def test_uploads_are_cut_as_the_data_is(tmp_path: Path) -> None:
    """By hand: ImageNet's evaluation crop, also of the part of a mixture that is held out from; digits have none."""
    imagenet: dict[str, Any] = {"short_side": (224, 224), "size": 224, "filter": "bilinear", "resize": "twice"}
    for side in (48, 96, 192):
        assert built(f"data=imagenet{side}").evaluation_crop == Crop(side, draft=3, **imagenet)
    assert built("data=imagenet64_web").evaluation_crop == Crop(64, draft=3, **imagenet)
    assert built().evaluation_crop.box(20, 10, 0)[0] == (5, 0, 15, 10)


def start(build: Components) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return launch(build.run.cfg, choices=build.run.choices, overrides=[])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task.completions=9",), r"task\.completions must lie in 1 … task\.at_most \(8\), got 9"),
        (("task.port=70000",), r"task\.port must be at most 65535"),
        (("task.threads=0",), r"task\.threads must be at least 1"),
        (("task.upload_mb=0",), r"task\.upload_mb must be at least 0\.001"),
        (("task.uploads_mb=5",), r"task\.upload_mb 20 must be below task\.uploads_mb 5"),
        (("task.allowed_hosts=demo",), r"task\.allowed_hosts must be a list, got 'demo'"),
        (("task.temperature=0",), "temperature must be at least 0.001"),
        (("task.norm=ln_9",), r"task\.norm must be one of ln_1, raw"),
        (("task.dtype=float64",), r"task\.dtype must be .*float16.*, got 'float64'"),
        (("task.layer=4",), r"task\.layer must lie in 0 … 3"),
        (("task.layer=middle",), r"task\.layer must be a layer's number .*, got 'middle'"),
        (("task.rows=9",), r"task\.rows must lie in 0 … 8"),
        (("task.split=dev",), "task.split must be one of train, val, test, got 'dev'"),
        (("task.host=192.0.2.1",), r"no page can be served at task\.host=192\.0\.2\.1"),
        (("resume=auto",), "leaves no run: it cannot be resumed"),
        (("rerun=true",), "leaves no run: it cannot be resumed"),
    ],
)
def test_bad_settings(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(built_demo(tmp_path, f"paths.runs={tmp_path / 'runs'}", *overrides))
    assert not (tmp_path / "runs").exists()


def test_a_demo_is_no_stage() -> None:
    build = built("task=pipeline", "++task.stages={demo: {}}")
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(ValueError, match="no stage of a pipe"):
        stage_runner(build)


def test_masked_pixel_networks_draw_no_images(tmp_path: Path) -> None:
    build = built_demo(tmp_path, causal=False)
    with pytest.raises(ValueError, match=r"predicts masked pixels \(bert\) and draws none"):
        start(build)


def test_without_gradio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Gradio, which is not installed here: pip install gradio"):
        start(built_demo(tmp_path))


def test_the_loss_of_the_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By hand; not known where the run says none, or its record is damaged, or the weights are not the run's last."""
    build = built_demo(tmp_path)
    assert build.weights is not None
    assert demo.describe_weights(build.weights)["validation loss"] == "not known"
    folder = RunFolder(tmp_path / "run")
    folder.start({}, [], {})
    folder.finish("pretrain", Result(numbers={"val/loss_gen": Number(1.25, "nats/token", 9)}), seconds=1.0)
    facts = demo.describe_weights(build.weights)
    assert facts["validation loss"] == "1.2500 nats per token"
    assert facts["trained on"] == "toy at 8×8, 1 steps"
    (folder.path / "result.json").write_text("{")
    assert demo.describe_weights(build.weights)["validation loss"] == "not known"
    assert "does not state its loss" in caplog.text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def while_it_serves(port: int, look: Callable[[], None]) -> threading.Thread:
    """Looks at the page once it is there, then presses Ctrl-C, from a thread beside the one that serves."""

    def wait() -> None:
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                    break
                except OSError:
                    time.sleep(0.1)
            look()
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def addresses() -> list[str]:
    """Of this machine, but for the one that only it can reach."""
    found = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way_out:
        try:
            way_out.connect(("192.0.2.1", 9))  # nothing is sent
            found.add(way_out.getsockname()[0])
        except OSError:
            pass
    return [str(address) for address in found if not str(address).startswith("127.")]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"no page can be served at task\.host=127\.0\.0\.1 task\.port={port}"):
            start(built_demo(tmp_path, f"task.port={port}"))


@pytest.mark.usefixtures("random_state")  # Gradio names a page by it
def test_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where the page is, serves this machine alone and asks no other, ends by Ctrl-C, and leaves nothing."""
    port, seen, temporary, others = free_port(), {}, tmp_path / "temporary", addresses()
    temporary.mkdir()
    requested: list[Any] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: requested.append(to[0]) or connect(self, to))
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *how, **kw: requested.append(host) or look_up(host, *how, **kw)
    )
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def look() -> None:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
        seen["says"] = "small: 3 blocks of 24" in page
        seen["analytics"] = '"analytics_enabled":false' in page.replace(" ", "")
        for address in others:
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, port), timeout=2)
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            pass
        assert list(temporary.glob("igpt-demo-*/*"))
        seen["looked"] = True

    build = built_demo(tmp_path, f"task.port={port}", f"paths.runs={tmp_path / 'runs'}")
    thread = while_it_serves(port, look)
    with caplog.at_level(logging.INFO):
        result = start(build)
    thread.join()
    assert seen == {"says": True, "analytics": True, "looked": True}
    assert requested
    assert {*requested} <= {"127.0.0.1", *others}
    assert result.numbers == {}
    assert f"the page is at http://127.0.0.1:{port}/" in caplog.text
    assert not (tmp_path / "runs").exists()
    assert not list(temporary.glob("igpt-demo-*"))
    with socket.socket() as again:
        assert again.connect_ex(("127.0.0.1", port)) != 0
