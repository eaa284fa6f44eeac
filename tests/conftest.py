"""Shared fixtures: where the oracles lie, small networks whose weights are nowhere neutral, one real run."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two of these processes share two cores, and the networks are tiny

import pytest
import torch
from filelock import FileLock

from igpt.metric.result import Number, Result
from igpt.model import c_library, cpu
from igpt.model.config import GPTConfig
from igpt.model.gpt import GPT
from igpt.run.components import Components
from tests.compositions import kept_compositions
from tests.process_state import Restorer, RoundedProducts

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(c_library.find_compiler() is None, reason="no C compiler (cc, or CC) is here")
SHARED = ROOT.parent / "shared"


CPU_BEFORE = pytest.StashKey[float]()  # CPU seconds of this process and its children, before the current phase
LONGEST = ("test_train.py", "test_ranks.py", "test_openai.py", "test_gpt.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process of the suite ends with one of them alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "list the N set-ups and tests that took most CPU seconds, those of ended child processes included"
    parser.addoption("--cpu", type=int, metavar="N", default=0, help=what)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.stash[CPU_BEFORE] = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Notes in each report the CPU seconds since the last one; unlike durations, they are the same on busy cores."""
    report: Any = yield
    now = sum(os.times()[:4])
    report.cpu_seconds, item.session.stash[CPU_BEFORE] = now - item.session.stash[CPU_BEFORE], now
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    n = terminalreporter.config.getoption("--cpu")
    reports = [each for some in terminalreporter.stats.values() for each in some if hasattr(each, "cpu_seconds")]
    if n:
        terminalreporter.section(f"most CPU seconds, of {sum(each.cpu_seconds for each in reports):.0f} of all tests")
    for each in sorted(reports, key=lambda each: -each.cpu_seconds)[:n]:
        terminalreporter.line(f"{each.cpu_seconds:7.2f} {each.when:8} {each.nodeid}")


@pytest.fixture(scope="session", autouse=True)
def kernel_cache() -> Iterator[None]:
    """Compiled networks of tests have a folder for this kind of CPU, as those of runs; else Inductor would name one."""
    with cpu.inductor_cache():
        yield


@pytest.fixture(scope="session", autouse=True)
def compositions() -> Iterator[None]:
    """Equal overrides are composed once a process."""
    with kept_compositions():
        yield


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Fails the test that leaves a setting or state of the process changed, and puts it back for the next one."""
    state = Restorer()
    yield
    if left := state.restore():
        pytest.fail(f"this test left changed: {'; '.join(f'{name} ({how})' for name, how in left.items())}", False)


@pytest.fixture
def random_state() -> Iterator[None]:
    """Python's random state, put back: for tests of libraries that draw from it."""
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.fixture
def medium_rounds() -> Iterator[None]:
    """float32 products at "medium" round to bfloat16, as on a CPU with AMX."""
    cpu.medium_format.cache_clear()
    with RoundedProducts():
        yield
    cpu.medium_format.cache_clear()


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared folder beside the project ({SHARED.name}/), which is not there")
    return SHARED


def perturbed(net: GPT, seed: int = 0, scale: float = 0.1) -> GPT:
    """The network with every weight drawn: heads away from zero, gains away from one."""
    net.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * (3 * scale if name == "wtet" else scale))
    return net


def parts_of_run(**parts: Any) -> Components:
    """Components of these parts, whatever a config would say: for a task that is called without one."""
    components = object.__new__(Components)
    vars(components).update(parts)
    return components


def learned_numbers(result: Result) -> dict[str, Number]:
    """The numbers of a result but those that measure the machine, which differ between equal runs."""
    return {key: number for key, number in result.numbers.items() if number.unit not in ("s", "GB", "device-days")}


def small_net(*, causal: bool = True, n_layer: int = 3, n_ctx: int = 16, n_vocab: int = 11) -> GPT:
    return perturbed(GPT(GPTConfig(n_layer=n_layer, n_embd=24, n_head=3, n_ctx=n_ctx, n_vocab=n_vocab, causal=causal)))


@pytest.fixture
def net() -> GPT:
    return small_net()


@pytest.fixture
def tokens(net: GPT) -> torch.Tensor:
    return torch.randint(net.n_vocab, (4, net.n_ctx), generator=torch.Generator().manual_seed(2))


ATTENTION_NODES = {"native": "igpt_attend", "sdpa": "ScaledDotProduct", "blocks": "CausalBlocks", "bmm": "BmmBackward"}


def attention_in_graph(output: torch.Tensor) -> set[str]:
    """How the attention that `output` depends on was computed, by the names of the nodes of its autograd graph."""
    names, seen, nodes = set(), set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            nodes += [before for before, _ in node.next_functions]
    return {way for way, part in ATTENTION_NODES.items() if any(part in name for name in names)}


class Planted:
    """Pickles as a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def run_killed(function: Callable[[], object]) -> None:
    """Calls a function in a forked process that ends right after it as by SIGKILL: nothing is closed or removed."""
    child = os.fork()
    if child == 0:
        try:
            held = function()  # what it returns is alive at the kill
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
        del held
    os.waitpid(child, 0)


def train_py(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python train.py …` in a process of its own, as a user would, with runs and cache below `cwd`."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=170, env=os.environ)
    assert not check or done.returncode == 0, done.stderr
    return done


TINY = (
    "model.n_layer=2",
    "model.n_embd=16",
    "task.stages.pretrain.steps=6",
    "task.stages.pretrain.warmup_steps=2",
    "task.stages.pretrain.val_every=3",
    "task.stages.pretrain.log_every=2",
    "task.stages.pretrain.checkpoint_every=3",
    "task.stages.sample.count=5",
    "task.stages.complete.count=2",
    *(
        f"task.stages.{stage}.{setting}"
        for stage in ("finetune", "scratch")
        for setting in ("steps=4", "val_every=2", "checkpoint_every=2")
    ),
    *(f"task.stages.{stage}.data.labels_per_class=null" for stage in ("probe", "finetune", "scratch")),
)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished quickstart, on digits with a tiny network; `../..` of it is where it was run.

    Made by the first process of the suite that asks for it, for all of them: nobody changes what is in it.
    """
    place = (
        tmp_path_factory.getbasetemp().parent / f"quickstart-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    )
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            place.mkdir()
            train_py("experiment=quickstart", "data=digits", *TINY, cwd=place)
    return min((place / "runs").glob("pipeline-*"))  # the first: a repetition has a longer name
