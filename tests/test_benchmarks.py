"""Benchmarks run, at sizes that take no time, and compare what computes the same. How fast is not asserted here."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import save_model
from igpt.model import c_library
from igpt.objective.ar import AR
from igpt.tokens.exact_encoding import ALARM, ERROR
from igpt.tokens.tokenizer_registry import save_tokenizer
from tests.checkpoint.test_igpt_format import make_metadata
from tests.conftest import attention_in_graph, small_net
from tests.tokens.test_vqvae import build_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ONCE = ["--rounds", "1"]


class Clock:
    """Stands for the module `time`: so many seconds pass from one look at it to the next."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.looks = seconds, 0

    def perf_counter(self) -> float:
        self.looks += 1
        return self.looks * self.seconds


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


@pytest.fixture
def small_weights(tmp_path: Path) -> Path:
    """A folder with the weights of a small network."""
    net = small_net()
    save_model(tmp_path / "model", net.state_dict(), make_metadata(net))
    return tmp_path / "model"


def test_training_step(medium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: ours, a plain rewrite and Hugging Face's, from the same weights, have the same loss after two steps.

    The ratios that are written are those of the times that are written.
    """
    import train_step

    monkeypatch.setattr(train_step, "disable_malloc_trim", lambda: None)
    out = tmp_path / "out.json"
    train_step.main(["--size", "tiny", "--no-compiled", "--plain", "--hold-peer", "--out", str(out), *ONCE])
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert set(rows) == {
        f"{who} {how}" for who in ("igpt", "plain", "hf", "hf held") for how in ("fp32", medium, "bf16")
    }
    own, hf = rows["igpt bf16"], rows["hf bf16"]
    assert own["against_hf"] == pytest.approx(hf["seconds"][0] / own["seconds"][0])
    assert own["against_shipped"] == pytest.approx(rows["hf fp32"]["seconds"][0] / own["seconds"][0])
    assert {"command", "commit", "torch", "cpu", "limits"} <= set(report)


def test_exact_tokens(tmp_path: Path) -> None:
    """By hand: at least one vector an image is computed again, float32 is off by far less than its bound."""
    import exact_tokens

    save_tokenizer(tmp_path / "tokenizer.json", build_tokenizer())
    report = exact_tokens.main(["--tokenizer", str(tmp_path), "--count", "9", *ONCE])
    assert report["recomputed"] >= 1
    assert 1e-9 < report["rounding"] < ERROR / ALARM


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
def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: rows train alike, from the same weights, and recompute activations where their name says so.

    By hand: a peak of 3 GiB.
    """
    import memory

    nets: list[Any] = []
    for name in ("our_net", "HuggingFace"):
        make = getattr(memory, name)
        monkeypatch.setattr(memory, name, lambda *of, make=make, **how: (nets.append(make(*of, **how)), nets[-1])[1])
    monkeypatch.setattr(memory.resource, "getrusage", lambda of: SimpleNamespace(ru_maxrss=3 * 2**20))
    names = [row for row in memory.ROWS if row != "igpt compiled"]
    rows = [memory.main(["--size", "tiny", "--row", row]) for row in names]
    assert all(figures["losses"] == pytest.approx(rows[0]["losses"], abs=1e-4) for figures in rows)
    assert rows[0]["losses"][1] < rows[0]["losses"][0]
    recomputed = [net.net.is_gradient_checkpointing if hasattr(net, "net") else net.checkpointing for net in nets]
    assert dict(zip(names, recomputed, strict=True)) == {
        "hf": False, "hf recomputed": True, "igpt": False, "igpt recomputed": True
    }  # fmt: skip
    assert all(figures["peak_gib"] == 3.0 for figures in rows)


def test_sampling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Invariant: greedy tokens of every way of ours and of Hugging Face's `generate` are the same, or there is no
    figure."""
    import sampling

    few = ["--size", "tiny", "--batch", "3", "--peer-batch", "5", "--ways", "columns", "layers", *ONCE]
    report = sampling.main(few)
    names = [f"igpt ({'native' if c_library.is_available() else 'columns'})", "igpt columns", "igpt layers", "hf"]
    rows = report["batches"][3]["rows"]
    assert list(rows) == (names if c_library.is_available() else [names[0], *names[2:]])
    assert [row.result for row in rows.values()] == [(3, 16)] * (len(rows) - 1) + [(5, 16)]
    assert report["batches"][3]["peer_batch"] == 5
    assert "greedy tokens of all rows are the same" in capsys.readouterr().out
    generate = sampling.generate

    def wrong(net: Any, *given: Any, backend: str) -> torch.Tensor:
        tokens = generate(net, *given, backend=backend)
        return tokens if backend != "layers" else torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % net.n_vocab], 1)

    monkeypatch.setattr(sampling, "generate", wrong)
    with pytest.raises(SystemExit, match="greedy tokens of igpt layers and of Hugging Face differ: no figures"):
        sampling.main(few)


def test_attention(medium: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: what autograd notes of each way, and PyTorch's attention in float64 of what they all give."""
    import attention

    monkeypatch.setattr(attention, "disable_malloc_trim", lambda: None)
    computed: dict[str, set[str]] = {}
    exact: list[torch.Tensor] = []
    attend = attention.self_attention

    def watched(qkv: torch.Tensor, n_head: int, *, causal: bool, backend: str) -> torch.Tensor:
        out: torch.Tensor = attend(qkv, n_head, causal=causal, backend=backend)
        computed.setdefault(backend, set()).update(attention_in_graph(out))
        if backend == "bmm":
            q, k, v = (part.unflatten(2, (n_head, -1)).transpose(1, 2) for part in qkv.detach().double().chunk(3, 2))
            exact.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))
        return out

    monkeypatch.setattr(attention, "self_attention", watched)
    report = attention.main(["--lengths", "16", "200", "--heads", "8", *ONCE])
    assert [(shape["t"], shape["precision"]) for shape in report["shapes"]] == [
        (t, precision) for t in (16, 200) for precision in ("fp32", medium, "bf16")
    ]
    assert computed == {way: {way} for way in attention.ways("cpu")}
    for shape, of_shape in zip(report["shapes"], exact[::3], strict=True):  # twice to warm up, once measured
        assert list(shape["rows"]) == list(computed)
        for row in shape["rows"].values():
            within = attention.WITHIN[shape["precision"]]
            torch.testing.assert_close(row.result.double(), of_shape, rtol=0, atol=within)


def test_attention_that_differs_gives_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    import attention

    monkeypatch.setattr(attention, "disable_malloc_trim", lambda: None)
    attend = attention.self_attention

    def wrong(qkv: torch.Tensor, n_head: int, *, causal: bool, backend: str) -> torch.Tensor:
        out: torch.Tensor = attend(qkv, n_head, causal=causal and backend != "bmm", backend=backend)
        return out

    monkeypatch.setattr(attention, "self_attention", wrong)
    with pytest.raises(SystemExit, match=r"the output of bmm and of .* differ by .*: no figures"):
        attention.main(["--lengths", "16", "--heads", "8", *ONCE])


def test_attention_by_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a window of 7 in a grid of 6 × 6 is full attention; C saves its outputs and one number a query."""
    import attention

    monkeypatch.setattr(attention, "disable_malloc_trim", lambda: None)
    report = attention.main(["--patterns", "--sides", "6", *ONCE])
    (shape,) = report["shapes"]
    backends = ("native", "without C") if c_library.is_available() else ("without C",)
    names = [f"{name} {backend}" for name in ("full", "local", "strided", "fixed", "axial") for backend in backends]
    assert list(shape["rows"]) == [*names, "linear without C"]
    assert [len(row.result) for row in shape["rows"].values()] == [1] * 2 * len(backends) + [2] * 3 * len(backends) + [
        1
    ]
    for backend in backends:
        full, local = (shape["rows"][f"{name} {backend}"].result for name in ("full", "local"))
        torch.testing.assert_close(local, full, rtol=0, atol=1e-5)
        assert not torch.allclose(shape["rows"][f"axial {backend}"].result, full, atol=1e-2)
    if c_library.is_available():
        assert shape["saved"]["axial native"] == 36 * (256 + 8) * 4 / 2**20

    attend = attention.masked_attention
    monkeypatch.setattr(
        attention,
        "masked_attention",
        lambda *given, backend, **named: attend(*given, backend=backend, **named) * (1.01 if backend != "bmm" else 1),
    )
    with pytest.raises(SystemExit, match=r"output and gradient of local .* differ by .*: no figures"):
        attention.main(["--patterns", "--sides", "6", *ONCE])


@pytest.mark.usefixtures("medium_rounds")
def test_rounded_products_are_not_taken_for_float32(monkeypatch: pytest.MonkeyPatch, shared: ModuleType) -> None:
    """Invariant: what is called float32 is held to float32; the precision is put back also where that ends it."""
    import attention

    monkeypatch.setattr(attention, "disable_malloc_trim", lambda: None)
    monkeypatch.setattr(shared, "medium", lambda device: "fp32+medium")
    with pytest.raises(SystemExit, match="no figures"):
        attention.main(["--lengths", "16", "--heads", "8", *ONCE])


@pytest.mark.usefixtures("medium")
def test_cost(shared: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: speeds and shares of steps that take 2⁻²⁰ s each; first losses of ln 512, so that networks are trained.

    6 (12 L C² + V C) + 6 L T C operations a token, at 100 GFLOP/s.
    """
    import cost

    monkeypatch.setattr(cost, "disable_malloc_trim", lambda: None)
    monkeypatch.setattr(shared, "time", Clock(2**-20))
    runs: list[Any] = []
    make_step = cost.make_step
    monkeypatch.setattr(cost, "make_step", lambda *of: (runs.append(make_step(*of)), runs[-1])[1])
    report = cost.main(["--lengths", "16", "32", "--widths", "32", "--layers", "1", "--tokens", "64", *ONCE])
    lengths, widths = (report[title] for title in ("length at width 256", "width at 1,024 tokens"))
    by_hand = {"16 tokens, width 256": (64, 5_529_600), "32 tokens, width 256": (64, 5_554_176)}
    assert {name: (row["tokens"], row["flops_a_token"]) for name, row in lengths.items()} == by_hand
    (row,) = widths.values()
    assert (row["tokens"], row["flops_a_token"]) == (1024, 368_640)
    assert row["of_peak"] == pytest.approx(368_640 * 1024 * 2**20 / 100e9)
    shown = capsys.readouterr().out
    assert "| 16 tokens, width 256 | 67,108,864 | 67,108,864 – 67,108,864 | 67,108,864 | 3710.85 |" in shown
    assert "| 32 tokens, width 256 | 67,108,864 | 67,108,864 – 67,108,864 | 66,811,922 | 3727.34 |" in shown
    for run in runs:
        first, second = run()[1]
        assert first == pytest.approx(6.238325, abs=1e-6)
        assert second < first


def test_encoding_and_kmeans(photos: Path, tmp_path: Path) -> None:
    """Invariant: our ids are the exact ones (the benchmark says so or ends); inertia within 5 % of scikit-learn's."""
    import encode

    few = ["--count", "4", "--colours", "8", "--pixels", "4000", "--cache", str(tmp_path)]
    report = encode.main(["--images", str(photos), *few, *ONCE])
    reference, own = report["inertia"].values()
    assert own == pytest.approx(reference, rel=0.05)


def test_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: the task and a plain loop have the same losses, before and after the codes start; else no figures."""
    import tokenizer

    monkeypatch.setattr(tokenizer, "disable_malloc_trim", lambda: None)
    small = ["--side", "16", "--crop", "8", "--batch", "4", "--codes", "16", "--hidden", "8", "--steps", "5", *ONCE]
    report = tokenizer.main([*small, "--precision", "fp32"])
    assert set(report["images_per_s"]) == {"plain loop fp32", "task=tokenizer fp32", "encoding"}
    monkeypatch.setattr(tokenizer, "crop_pixels", lambda pixels, keys, side, multiple: pixels[:, :side, :side])
    with pytest.raises(SystemExit, match="the loss of task=tokenizer and of plain loop differ"):
        tokenizer.main([*small, "--precision", "fp32"])


@pytest.mark.usefixtures("medium")
def test_probe() -> None:
    """Invariant: features equal Hugging Face's (the benchmark says so or ends), and fits end near the minimum."""
    import probe

    few = ["--layers", "3", "--images", "60", "--width", "8", "--C_grid", "0.1"]
    report = probe.main(["--size", "tiny", "--batch", "2", *few, *ONCE])
    assert report["fits"][0.1]["igpt"].result < 1e-6


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    """Invariant: as many files are listed and opened as were made (the benchmark says so or ends)."""
    import list_files

    report = list_files.main(["--files", "1040", *ONCE])
    assert all(len(seconds) == 1 for seconds in report["seconds"].values())
    assert "1,040 files" in capsys.readouterr().out


def test_data_path(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: rates, where each thing that is timed takes two seconds, and a training step half a one.

    Invariant: resizing twice is the plain way but for the rounding of pixels, other ways are not.
    """
    import data_path

    monkeypatch.setattr(data_path, "disable_malloc_trim", lambda: None)
    monkeypatch.setattr(data_path, "K", 8)
    monkeypatch.setattr(data_path, "BATCH", 4)
    monkeypatch.setattr(data_path, "time", Clock(2.0))
    monkeypatch.setattr(data_path, "make_step", lambda net, tokens, label: lambda: (0.5, len(tokens)))
    few = ["--seconds", "5", "--workers", "0", "--size", "tiny", *ONCE]
    report = data_path.main(["--photos", str(photos), *few])
    ways = list(data_path.ways(32))
    assert report == {
        "crops": {f"{side}, {way}": 4 / 2 for side in (32, 48, 64, 96, 192) for way in ways},
        "loading": {"takes": 2 / 0.5, "0 workers": 3 * 4 / 6},  # the first batch is not counted
        "encoding photographs": {"distinct colours": 8 / 2, "table": 8 / 2, "s to build it": 2.0},
    }
    shown = capsys.readouterr().out
    assert "| 0 | 2 | 0.5× |" in shown
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith(("| 32 |", "| 48 |", "| 64 |"))]
    assert [row[1] for row in rows] == ways * 3
    differences = {name: [float(row[4]) for row in rows if row[1] == name] for name in ways}  # grey levels
    assert differences.pop("plain: whole image, crop, resize") == [0, 0, 0]
    for name, items in differences.items():
        assert max(items) < 0.2 if name.startswith("resize=twice") else min(items) > 0.4, name


def test_the_trace_of_a_network(small_weights: Path, tmp_path: Path) -> None:
    """Independent source: the network itself, its residual stream and the objective's loss."""
    import trace_network

    net = find_weights(str(small_weights)).net()
    tokens = torch.randint(net.n_vocab, (5, net.n_ctx), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", tokens.numpy().astype(np.uint8))
    out = tmp_path / "trace.npz"
    trace_network.main([str(small_weights), str(tmp_path / "ids.npy"), "--batch", "2", "--out", str(out)])
    traced = np.load(out)
    with torch.no_grad():
        logits, outputs = net(tokens), torch.stack(list(net.hidden_states(tokens))[1:])
    assert np.abs(traced["logits"] - logits.numpy()).max() < 1e-5
    assert np.abs(traced["block_outputs"] - outputs.numpy()).max() < 1e-5
    assert traced["image_nats"] == pytest.approx(AR().per_example_loss(logits, tokens, None).numpy(), abs=1e-5)
    assert traced["class_scores"].shape == (5, 0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 63), np.int64), r"whole numbers, \(images, 16\): int64 \(2, 63\)"),
        (np.zeros(16, np.int64), r"int64 \(16,\)"),
        (np.zeros((2, 16)), "float64"),
        (np.full((2, 16), 99), r"tokens lie in 0 … 10, got 99 to 99"),
        (np.zeros((0, 16), np.int64), r"\(0, 16\)"),
        (np.array([{}], dtype=object), "Object arrays cannot be loaded"),
    ],
)
def test_tokens_that_cannot_be_traced(small_weights: Path, tmp_path: Path, array: np.ndarray, message: str) -> None:
    import trace_network

    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    with pytest.raises(SystemExit, match=message):
        trace_network.main([str(small_weights), str(tmp_path / "ids.npy")])


def test_masks_go_with_the_objective(small_weights: Path, tmp_path: Path) -> None:
    import trace_network

    np.save(tmp_path / "ids.npy", np.zeros((1, 16), np.int64))
    with pytest.raises(SystemExit, match="for networks of masked pixels"):
        trace_network.main([str(small_weights), str(tmp_path / "ids.npy"), "--visible", str(tmp_path / "ids.npy")])


def test_steps_of_variants(capsys: pytest.CaptureFixture[str]) -> None:
    """Invariant: a variant's steps are those of its network: other losses than the paper's from the second on."""
    small = ["--side", "4", "--batch", "2", "--rounds", "1", "--eager", "--float32", "--variants", "axial", "swiglu"]
    import variants

    rows = variants.main(small)["variants"]
    assert list(rows) == ["paper", "axial", "swiglu"]
    assert len({float(row["rows"].result) for row in rows.values()}) == 3
    assert "| axial |" in capsys.readouterr().out


SOURCE = '"""What it is.\n\nMore.\n"""\n\nX = """a\n\nb"""  # one\n\n\ndef f():\n    "What."\n    # why\n    return X\n'


def test_counted_lines_of_source() -> None:
    """By hand: X's three lines, def and return; every file of src/ lies in an area."""
    import count_lines

    assert count_lines.count_code_lines(SOURCE) == 5
    counts = count_lines.count_by_area(None)
    assert counts["files of all"] == sum(counts[f"files of {area}"] for area in count_lines.AREAS) > 200
    with pytest.raises(ValueError, match=r"part\.py is in no area: add new to AREAS"):
        count_lines.find_area("src/igpt/new/part.py")


def test_training_on_a_shared_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Invariant: the printed share is that of the speeds, from times of every row, round and neighbour."""
    import shared_cpu

    arguments = ["--size", "tiny", "--steps", "1", "--rounds", "2", "--precision", "fp32"]
    rows = shared_cpu.main(arguments)["rows"]
    assert list(rows) == ["default fp32", "default again fp32", f"{shared_cpu.IGPT} fp32"]
    for row in rows.values():
        assert len(row["alone"]) == len(row["beside"]) == 2
        assert row["kept"] == pytest.approx(sum(row["beside"]) / sum(row["alone"]))  # a median of two is their mean
    assert f"| default | fp32 | {sum(rows['default fp32']['alone']) / 2:.1f}, " in capsys.readouterr().out
