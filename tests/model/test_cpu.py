"""What float32 products compute on this CPU is found out by one of them; kernels are kept by kind of CPU."""

import os
import platform
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from igpt.model import cpu, dispatch
from tests.conftest import needs_compiler, run_killed
from tests.task.conftest import machine

CPU = torch.device("cpu")


def largest_error(precision: str) -> float:
    """Of a product of 512³ normal numbers: about 5e-5 in float32, 0.25 where operands round to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(512, 512, generator=generator) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        return float((one @ other - (one.double() @ other.double())).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)


def test_it_is_what_products_do_here() -> None:
    """Independent source: the error of another product against float64; the precision stays what it was."""
    before = torch.get_float32_matmul_precision()
    found = cpu.medium_format(CPU)
    assert torch.get_float32_matmul_precision() == before
    error = largest_error("medium")
    assert found == ("fp32" if error < 1e-3 else "bf16" if error > 0.05 else "tf32")
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):  # what a network is being laid out in
        cpu.medium_format.cache_clear()
        assert cpu.medium_format(CPU) == found


@pytest.mark.usefixtures("medium_rounds")
def test_where_it_rounds() -> None:
    """Invariant: `auto` computes in float32, also on a CPU on which "medium" is bfloat16."""
    assert largest_error("medium") > 0.05
    assert cpu.medium_format(CPU) == "bf16"
    assert dispatch.matmul_precision(CPU) == "highest"
    assert largest_error(dispatch.matmul_precision(CPU)) < 1e-3


def test_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "medium_format", lambda device: "fp32")
    assert dispatch.matmul_precision(CPU) == ("medium" if platform.machine() in dispatch.X86 else "highest")
    assert dispatch.matmul_precision(torch.device("meta")) == "highest"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, None),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "STRICT"}, None),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, "ONEDNN_DEFAULT_FPMATH_MODE=BF16"),
        ({"DNNL_DEFAULT_FPMATH_MODE": "any"}, "DNNL_DEFAULT_FPMATH_MODE=any"),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "strict", "DNNL_DEFAULT_FPMATH_MODE": "any"}, None),
    ],
)
def test_a_setting_that_rounds_is_said(
    variables: dict[str, str], message: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the first rank, once."""
    for name in cpu.FPMATH_MODES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    machine().warn_of_rounding()
    assert len(caplog.records) == (message is not None)
    assert message is None or message in caplog.text
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    caplog.clear()
    machine(devices=2).warn_of_rounding()
    assert not caplog.records


def test_kernels_of_each_kind_of_cpu_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: another limit, or another CPU, is another folder; the user's own is taken; nothing stays set."""
    monkeypatch.delenv(cpu.INDUCTOR_CACHE, raising=False)
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    def folder() -> Path:
        with machine(compile="auto").kernel_cache():
            return Path(os.environ[cpu.INDUCTOR_CACHE])

    folders = [folder(), folder()]
    assert folders[0] == folders[1]
    assert folders[0].parent == Path(default_cache_dir())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    folders.append(folder())
    monkeypatch.setattr(cpu, "cpu_features", lambda: "another")
    folders.append(folder())
    assert len(set(folders)) == 3
    assert cpu.INDUCTOR_CACHE not in os.environ
    with machine(compile=False).kernel_cache():
        assert cpu.INDUCTOR_CACHE not in os.environ
    monkeypatch.setenv(cpu.INDUCTOR_CACHE, "mine")
    with machine(compile=True).kernel_cache():
        assert Path(cache_dir()) == Path("mine").absolute()


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled networks, below `tmp_path`, as a first run leaves it."""
    monkeypatch.delenv(cpu.INDUCTOR_CACHE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with cpu.inductor_cache():
        folder = Path(os.environ[cpu.INDUCTOR_CACHE])
        for name in ("a", "b"):
            (folder / name).mkdir()
            (folder / name / f"{name}.so").write_bytes(name.encode() * 9000)
    return folder


@contextmanager
def environment_without(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    yield
    if value is not None:
        os.environ[name] = value


def list_kernels(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.so"))


def test_kernels_are_of_this_user_alone(kernels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: a folder that others may write is not used, said; the one instead goes with the process."""
    assert [folder.stat().st_mode & 0o777 for folder in (kernels, kernels.parent)] == [0o700] * 2
    for folder in (kernels, kernels.parent):
        folder.chmod(0o770)
        caplog.clear()
        with cpu.inductor_cache():
            instead = Path(os.environ[cpu.INDUCTOR_CACHE])
            assert instead.stat().st_mode & 0o777 == 0o700
            assert not instead.is_relative_to(kernels.parent)
        assert not instead.exists()
        (message,) = [record.message for record in caplog.records]
        assert f"{folder} may be written by others" in message
        folder.chmod(0o700)


def test_damaged_kernels_are_removed(kernels: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Invariant: a cut one, which would end the process, is gone, said; so are those that a killed run left."""
    (kernels / "a" / "a.so").write_bytes(b"a" * 5000)
    with cpu.inductor_cache():
        assert list_kernels(kernels) == ["b.so"]
        assert "a.so is damaged and is compiled again" in caplog.text
        (kernels / "c.so").write_bytes(b"being written by this run")
        with environment_without(cpu.INDUCTOR_CACHE), cpu.inductor_cache():  # another process at the same time
            assert list_kernels(kernels) == ["b.so", "c.so"]
        (kernels / "checksums.json").write_text("{")  # damaged: nothing is known of any
    with cpu.inductor_cache():
        assert list_kernels(kernels) == ["b.so", "c.so"]  # listed by the first, which ended last

    def compile_and_be_killed() -> None:
        with environment_without(cpu.INDUCTOR_CACHE), cpu.inductor_cache():
            (kernels / "d.so").write_bytes(b"cut sho")
            os.kill(os.getpid(), signal.SIGKILL)

    with cpu.inductor_cache():
        run_killed(compile_and_be_killed)
    with cpu.inductor_cache():  # what the other process wrote was not listed
        assert list_kernels(kernels) == ["b.so", "c.so"]
    run_killed(compile_and_be_killed)
    with cpu.inductor_cache():
        assert list_kernels(kernels) == ["b.so", "c.so"]
    assert not list(kernels.glob(".*.part"))


@needs_compiler
def test_c_for_another_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: `CC` may name the CPU that the C is compiled for; each is a file of its own."""
    from igpt.model import c_library

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilers = [["cc"], ["cc", "-march=x86-64-v3"], ["cc", "-march=x86-64-v2"], ["cc", "-mno-avx512f"]]
    assert [c_library.target(compiler) for compiler in compilers] == [["-march=native"], [], [], ["-march=native"]]
    assert len({c_library.library_path(compiler) for compiler in compilers}) == 4
