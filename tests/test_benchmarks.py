"""Benchmarks run, at sizes that take no time, and compare what computes the same. How fast is not asserted here."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ONCE = ["--rounds", "1"]


class Here:
    """Stands for `machine.Side`: its rows in this process."""

    def __init__(self, make: Any, *arguments: Any) -> None:
        self.made = make(*arguments)

    def rows(self) -> Any:
        return self.made

    def close(self) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def shared() -> Iterator[ModuleType]:
    """`benchmarks/machine.py`, its own measurements of this machine and processes left out."""
    sys.path.insert(0, str(BENCHMARKS))
    import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "peak_gflops", lambda dtype, matmul, device: 100.0)
        patch.setattr(machine, "bandwidth_gib", lambda device: 10.0)
        patch.setattr(machine, "Side", Here)
        yield machine
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(params=["as it is here", "rounded to bfloat16"])
def medium(request: pytest.FixtureRequest, shared: ModuleType) -> str:
    """The label of rows at "medium", on this CPU and on one that rounds float32 products, as those with AMX do."""
    if request.param == "rounded to bfloat16":
        request.getfixturevalue("medium_rounds")
        assert shared.medium("cpu") == "bf16-products"
    label: str = shared.medium("cpu")
    return label


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(4):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def test_training_step(medium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: ours, a plain rewrite and Hugging Face's, from the same weights, have the same loss after two steps.

    The ratios that are written are those of the times that are written.
    """
    import train_step

    monkeypatch.setattr(train_step, "hold_memory", lambda: None)
    out = tmp_path / "out.json"
    train_step.main(["--size", "tiny", "--no-compiled", "--plain", "--hold-peer", "--out", str(out), *ONCE])
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert set(rows) == {
        f"{who} {how}" for who in ("igpt", "plain", "hf", "hf held") for how in ("fp32", medium, "bf16")
    }
    ours, hf = rows["igpt bf16"], rows["hf bf16"]
    assert ours["against_hf"] == pytest.approx(hf["seconds"][0] / ours["seconds"][0])
    assert ours["against_shipped"] == pytest.approx(rows["hf fp32"]["seconds"][0] / ours["seconds"][0])
    assert {"command", "commit", "torch", "cpu", "limits"} <= set(report)


def test_rows_that_disagree_give_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    import train_step

    plain = train_step.plain_net

    def wrong(size: str, **how: Any) -> Any:
        net = plain(size, **how)
        net.head.weight.data.mul_(3)
        return net

    monkeypatch.setattr(train_step, "plain_net", wrong)
    with pytest.raises(SystemExit, match="the loss of plain fp32 and of igpt fp32 differ"):
        train_step.main(
            ["--size", "tiny", "--no-compiled", "--plain", "--no-peer", "--return-memory", "--precision", "fp32", *ONCE]
        )


@pytest.mark.usefixtures("medium")
def test_memory() -> None:
    import memory

    rows = [memory.main(["--size", "tiny", "--row", row]) for row in memory.ROWS if row != "igpt compiled"]
    assert all(figures["losses"] == pytest.approx(rows[0]["losses"], abs=1e-4) for figures in rows)
    assert all(figures["peak_gib"] > 0.1 for figures in rows)


def test_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    """Invariant: greedy tokens of every way of ours and of Hugging Face's `generate` are the same."""
    import sampling

    report = sampling.main(["--size", "tiny", "--batch", "3", "--ways", "columns", "layers", *ONCE])
    assert len(report["batches"][3]["rows"]) in (3, 4)  # without a C compiler one less
    assert "greedy tokens of all rows are the same" in capsys.readouterr().out


def test_attention(medium: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: every way gives the same (the benchmark says so or ends)."""
    import attention

    monkeypatch.setattr(attention, "hold_memory", lambda: None)
    report = attention.main(["--lengths", "16", "200", "--heads", "8", *ONCE])
    assert len(report["shapes"]) == 6
    assert [shape["precision"] for shape in report["shapes"][:3]] == ["fp32", medium, "bf16"]


@pytest.mark.usefixtures("medium_rounds")
def test_rounded_products_are_not_taken_for_float32(monkeypatch: pytest.MonkeyPatch, shared: ModuleType) -> None:
    """Invariant: what is called float32 is held to float32; the precision is put back also where that ends it."""
    import attention

    monkeypatch.setattr(attention, "hold_memory", lambda: None)
    monkeypatch.setattr(shared, "medium", lambda device: "fp32+medium")
    with pytest.raises(SystemExit, match="no figures"):
        attention.main(["--lengths", "16", "--heads", "8", *ONCE])


@pytest.mark.usefixtures("medium")
def test_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    import cost

    monkeypatch.setattr(cost, "hold_memory", lambda: None)
    report = cost.main(["--lengths", "16", "32", "--widths", "32", "--layers", "1", "--tokens", "64", *ONCE])
    assert [len(rows) for title, rows in report.items() if title != "limits"] == [2, 1]


def test_encoding_and_kmeans(photos: Path, tmp_path: Path) -> None:
    """Invariant: our ids are the exact ones (the benchmark says so or ends); inertia within 5 % of scikit-learn's."""
    import encode

    few = ["--count", "4", "--colours", "8", "--pixels", "4000", "--cache", str(tmp_path)]
    report = encode.main(["--images", str(photos), *few, *ONCE])
    theirs, ours = report["inertia"].values()
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.usefixtures("medium")
def test_probe() -> None:
    """Invariant: features equal Hugging Face's (the benchmark says so or ends), and fits end near the minimum."""
    import probe

    few = ["--layers", "3", "--images", "60", "--width", "8", "--strengths", "0.1"]
    report = probe.main(["--size", "tiny", "--batch", "2", *few, *ONCE])
    assert report["fits"][0.1]["igpt"].result < 1e-6


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    """Invariant: as many files are listed and opened as were made (the benchmark says so or ends)."""
    import list_files

    report = list_files.main(["--files", "1040", *ONCE])
    assert all(len(seconds) == 1 for seconds in report["seconds"].values())
    assert "1,040 files" in capsys.readouterr().out


def test_data_path(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data_path

    monkeypatch.setattr(data_path, "hold_memory", lambda: None)
    monkeypatch.setattr(data_path, "K", 8)
    monkeypatch.setattr(data_path.Photographs, "__len__", lambda self: 1)
    report = data_path.main(["--photos", str(photos), "--workers", "0", "--size", "tiny", *ONCE])
    assert set(report) == {"crops", "loading", "encoding photographs"}
    assert all(rate > 0 for rates in report.values() for rate in rates.values())
