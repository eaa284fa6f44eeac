"""What `benchmarks/gpu.py` stands on: sides of a comparison, data sheets, plans, kernels, wheels, the page."""

import json
import multiprocessing
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_benchmarks import BENCHMARKS, Here


@pytest.fixture(scope="module", autouse=True)
def shared() -> Iterator[ModuleType]:
    """`benchmarks/machine.py`"""
    sys.path.insert(0, str(BENCHMARKS))
    import machine

    yield machine
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("Tesla V100-SXM2-16GB", None), ("NVIDIA GB200", None),
    ],
)  # fmt: skip
def test_data_sheets(card: str, tflops: float | None, shared: ModuleType) -> None:
    """Independent source: NVIDIA's data sheets, dense bfloat16."""
    assert shared.data_sheet_tflops(card) == tflops


def add_wheel(folder: Path, name: str, *needs: str) -> Path:
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {each}" for each in needs)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n\n")
    return path


def test_what_a_bare_image_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent source: a bare CUDA image was tried by blocking imports; these six, and not PyTorch's own needs."""
    import gpu_wheels

    wanted = gpu_wheels.list_wheels_to_make()
    six = {"hydra-core", "omegaconf", "antlr4-python3-runtime", "datasets", "dill", "multiprocess"}
    assert six | {"pytest", "wandb"} <= set(wanted)
    assert not {"torch", "numpy", "lightning", "sympy", "scipy", "jinja2", "deepspeed", "gradio"} & set(wanted)
    carried = set(gpu_wheels.list_wheels_to_make(carried=["pydantic"])) - set(wanted)
    assert carried >= {"pydantic", "pydantic-core"}
    assert not carried & {"torch", "numpy", "transformers"}
    pure, compiled = gpu_wheels.describe_commands(tmp_path, ["antlr4-python3-runtime", "pandas"], "3.12")
    assert pure[3:] == ["wheel", "--no-deps", "--wheel-dir", str(tmp_path), "antlr4-python3-runtime==4.9.3"]
    assert {"download", "--only-binary=:all:", "3.12"} < set(compiled)

    installed = gpu_wheels.find_installed
    monkeypatch.setattr(gpu_wheels, "find_installed", lambda name: None if name in six | {"wandb"} else installed(name))
    made = [
        add_wheel(tmp_path, "hydra-core", "omegaconf<2.4,>=2.2", "antlr4-python3-runtime==4.9.*", "packaging"),
        add_wheel(tmp_path, "omegaconf", "antlr4-python3-runtime (==4.9.*)"),
        add_wheel(tmp_path, "datasets", "numpy>=1.17", 'dill; python_version >= "3"', 'tensorflow; extra == "tf"'),
        add_wheel(tmp_path, "antlr4-python3-runtime", 'typing; python_version < "3.5"'),
    ]
    wheels, absent = gpu_wheels.find_missing(tmp_path)
    assert sorted(wheels) == sorted(made)
    assert sorted(absent) == ["dill", "wandb"]
    commands: list[Any] = []
    monkeypatch.setattr(gpu_wheels.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    assert sorted(gpu_wheels.provide(tmp_path, tmp_path / "site")) == ["dill", "wandb"]
    assert {"--no-index", "--no-deps", "--target", *map(str, made)} < set(commands[0])
    assert str(tmp_path / "site") in sys.path


def test_the_page_shows_the_figures_on_record() -> None:
    """Invariant: the marked block of docs/performance.md is the table of docs/gpu.json, or says that there is none."""
    import gpu

    report = json.loads(gpu.RECORD.read_text()) if gpu.RECORD.is_file() else None
    page = gpu.DOCS.read_text()
    assert gpu.replace_block(page, gpu.render(report)) == page


def test_a_side_that_dies_is_a_line(shared: ModuleType) -> None:
    """Invariant: one line that says why; no EOFError."""

    def build_too_much() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def make_side() -> tuple[Any, Any]:
        side = object.__new__(shared.Side)
        side._here, there = multiprocessing.Pipe()
        side._of, side._process = "peer_rows", SimpleNamespace(join=lambda: None, exitcode=-9)
        return side, there

    side, there = make_side()
    shared._serve(there, build_too_much, ())
    with pytest.raises(SystemExit, match=r"^peer_rows: OutOfMemoryError: CUDA out of memory: no figures$"):
        side._receive()
    side, there = make_side()
    there.close()
    with pytest.raises(SystemExit, match=r"ended with exit code -9, killed \(memory\?\): no figures"):
        side._receive()


def test_sides_take_turns(shared: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: alone, one lives after the other; else all live and rows are interleaved."""
    alive: list[str] = []

    class Counted(Here):
        def __init__(self, make: Any, *arguments: Any) -> None:
            super().__init__(make, *arguments)
            alive.append(arguments[0])
            most.append(len(alive))

        def close(self) -> None:
            alive.pop()

    most: list[int] = []
    monkeypatch.setattr(shared, "Side", Counted)
    sides = [(lambda name: {name: lambda: (1.0, name)}, "a"), (lambda name: {name: lambda: (2.0, name)}, "b")]
    assert {name: row.seconds for name, row in shared.take_turns(sides, 2, alone=True).items()} == {
        "a": [1.0, 1.0], "b": [2.0, 2.0]
    }  # fmt: skip
    assert max(most) == 1
    shared.take_turns(sides, 1, alone=False)
    assert max(most) == 2


def test_files_of_tests_for_a_gpu() -> None:
    """Invariant: every file that marks a test, by itself or by what is shared."""
    import gpu_runs

    assert {*gpu_runs.find_test_files()} == {
        "tests/model/test_gpu.py", "tests/task/test_gpu.py", "tests/task/test_gpu_training.py"
    }  # fmt: skip


def test_the_plan_of_a_way() -> None:
    """By hand: eager keeps a bfloat16 copy of attention's weights; half of the stream's 2 × 4 bytes."""
    import gpu_train

    network = gpu_train.describe_network("l")
    eager, blocks, narrow = (
        gpu_train.plan_memory(network, 4, device="cuda", way=way) for way in ("eager", "blocks", "residual")
    )
    assert blocks <= eager
    assert blocks - narrow > 0.9 * 48 * 4 * 1024 * 1536 * 2 * 2


def test_regions_of_kernels_do_not_count_twice() -> None:
    """By hand: of a GPU the kernels alone, without the region of their optimiser."""
    import gpu_train

    def make(key: str, device: str, microseconds: float, *, region: bool = False) -> Any:
        return SimpleNamespace(
            key=key, device_type=SimpleNamespace(name=device), self_device_time_total=microseconds,
            self_cpu_time_total=1.0, is_user_annotation=region,
        )  # fmt: skip

    events = [
        make("FusedAdam", "CUDA", 5.0), make("Optimizer.step#Adam.step", "CUDA", 5.0, region=True),
        make("aten::mm", "CPU", 7.0),
    ]  # fmt: skip
    assert gpu_train.select_times(events, "cuda") == {"FusedAdam": 5.0}
    assert gpu_train.select_times(events, "cpu") == {"aten::mm": 1.0}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam", "optimiser"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop", "attention"),
        ("triton_red_fused__to_copy_add_div_mul_12", "elementwise"),
        ("Memset (Device)", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    import gpu_train

    assert gpu_train.classify(kernel) == kind
