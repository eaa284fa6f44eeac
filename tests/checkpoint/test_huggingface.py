"""Hugging Face's ImageGPT folders, held against its own code."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTImageProcessor

from igpt.checkpoint import huggingface, tensors
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights, save_model
from igpt.model.generate import Sampling, generate
from igpt.model.gpt import GPT
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from tests.checkpoint.test_igpt_format import make_metadata
from tests.conftest import Planted, perturbed, small_net

K, R = 11, 4


def palette() -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (K, 3)).astype(np.float32))


def native(folder: Path, net: GPT, order: PixelOrder | None = None, **changed: Any) -> Weights:
    """A network saved in our format."""
    colours = palette()
    tokenizer = PaletteTokenizer(colours, order or PixelOrder.from_name(4, "raster"))
    metadata = replace(make_metadata(net), tokenizer=tokenizer, **changed)
    save_model(folder, net.state_dict(), metadata)
    return find_weights(str(folder))


@pytest.fixture
def exported(tmp_path: Path, net: GPT) -> Path:
    huggingface.write(tmp_path / "hf", native(tmp_path / "ours", net))
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def reference_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of Hugging Face's, saved by its own code, with their biases at zero as in what OpenAI gave."""
    folder = tmp_path_factory.mktemp("theirs")
    config = ImageGPTConfig(vocab_size=K + 1, n_positions=R * R, n_embd=24, n_layer=3, n_head=3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = ImageGPTForCausalImageModeling(config)
        for name, weight in model.named_parameters():
            weight.zero_() if name.endswith(".bias") else weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    size = {"height": R, "width": R}
    ImageGPTImageProcessor(clusters=palette().centres, size=size).save_pretrained(folder)
    return folder


def opened(folder: Path) -> Any:
    model, report = ImageGPTForCausalImageModeling.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # no key missing, unexpected or mismatched
    return model.eval()


def their_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    start = torch.full((len(tokens), 1), K)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits
    return logits


def test_their_model_computes_the_same(exported: Path, net: GPT, tokens: torch.Tensor) -> None:
    """Independent source: logits of Hugging Face's code, to 1e-5, and its greedy samples, exactly."""
    model = opened(exported)
    with torch.no_grad():
        assert (net(tokens) - their_logits(model, tokens)).abs().max() < 1e-5
    drawn = model.generate(torch.full((2, 1), K), max_new_tokens=R * R, do_sample=False, pad_token_id=0)
    own = generate(net, torch.zeros(2, R * R), Sampling(1.0, 1, None))
    assert torch.equal(drawn[:, 1:], own)
    assert model.config.bos_token_id == K


def test_their_processor_makes_the_same_tokens(exported: Path) -> None:
    """Independent source: Hugging Face's image processor, on images of the right size."""
    processor = ImageGPTImageProcessor.from_pretrained(exported)
    pixels = np.random.default_rng(1).integers(0, 256, (5, R, R, 3), dtype=np.uint8)
    ids = processor(list(pixels), return_tensors="pt", input_data_format="channels_last")["input_ids"]
    assert torch.equal(ids, palette().encode(torch.from_numpy(pixels)).flatten(1))
    assert np.array_equal(np.asarray(processor.clusters, dtype=np.float32), palette().centres)


def test_there_and_back_is_bit_exact(exported: Path, tmp_path: Path, net: GPT) -> None:
    """Round trip: ours → theirs → ours, weights and all that is said of them."""
    before, after = find_weights(str(tmp_path / "ours")), find_weights(str(exported))
    assert after.metadata == before.metadata
    assert all(torch.equal(weight, net.state_dict()[name]) for name, weight in after.net().state_dict().items())


def test_theirs_is_read(reference_model: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    """Independent source: the logits of their model; the start vector is the last row of their table."""
    for place in (reference_model, reference_model / "config.json", reference_model / "model.safetensors"):
        weights = find_weights(str(place))
        net = weights.net()
        with torch.no_grad():
            assert (net(tokens) - their_logits(opened(reference_model), tokens)).abs().max() < 1e-5
    table = load_file(reference_model / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(net.sos, table[K])
    assert torch.equal(net.wte, table[:K])
    assert (weights.metadata.model, weights.metadata.data) == ("igpt_3x24", "huggingface4")
    assert weights.tokenizer.hash == palette().hash
    huggingface.write(tmp_path / "again", weights)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(
        torch.equal(tensor, again[name]) for name, tensor in load_file(reference_model / "model.safetensors").items()
    )


def copied(reference_model: Path, to: Path) -> Path:
    to.mkdir()
    for path in reference_model.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_what_older_releases_saved(reference_model: Path, tmp_path: Path) -> None:
    """Causal masks among the weights, and PyTorch's own file instead of safetensors: as the Hub's first copies."""
    folder = copied(reference_model, tmp_path / "old")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    before = find_weights(str(reference_model)).net().state_dict()
    for kind in (torch.float32, torch.uint8, torch.bool):
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, R * R, R * R).tril().to(kind) for i in range(3)}
        masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
        torch.save(state | masks, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind is torch.uint8)
        after = find_weights(str(folder)).net().state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        save_file(state | masks, folder / "model.safetensors")
        after = find_weights(str(folder)).net().state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        (folder / "model.safetensors").unlink()


def config(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return change


def state(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors_ = load_file(folder / "model.safetensors")
        change(tensors_)
        save_file(tensors_, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def clusters(value: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": value})) and None


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def cut(name: str, kept: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:kept]) and None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (config(model_type="gpt2"), "model_type 'gpt2', expected 'imagegpt'"),
        (config(activation_function="gelu"), "activation_function 'gelu' ≠ 'quick_gelu'"),
        (config(layer_norm_epsilon=1e-6), "layer_norm_epsilon 1e-06 ≠ 1e-05"),
        (config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (config(tie_word_embeddings=True), "tie_word_embeddings"),
        (config(n_inner=100), "n_inner 100 ≠ 96"),
        (config(n_embd=None), "does not say the network's sizes"),
        (config(n_positions=15), "15 positions are no square image"),
        (config(n_positions=-16), "does not say the network's sizes"),
        (config(n_layer=float("inf")), "does not say the network's sizes"),
        (config(n_layer=10**400), "does not say the network's sizes"),
        (config(igpt="text"), "is not complete"),
        (config(igpt={"model": "../../x"}), "model is '../../x', expected letters"),
        (config(igpt={"step": None}), "step is None, expected a int"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text("[1]") and None,
            "is not a JSON file of settings",
        ),
        (
            lambda folder: (folder / "config.json").write_text("[" * 100_000) and None,
            "no config.json|is not a JSON file",
        ),
        (config(n_embd=32, n_head=4), r"misshapen .*\(24, 72\) in the file, \(32, 96\)"),
        (config(n_layer=2), r"unexpected transformer\.h\.2"),
        (
            state(lambda s: s["transformer.h.1.attn.c_attn.bias"].__setitem__(4, 1e-3)),
            r"h\.1\.attn\.c_attn\.bias not ze",
        ),
        (state(lambda s: s.pop("transformer.h.1.ln_2.weight")), r"missing transformer\.h\.1\.ln_2\.weight"),
        (state(lambda s: s.pop("lm_head.weight")), r"has no lm_head\.weight"),
        (state(lambda s: s.update({"score.weight": torch.ones(2, 24)})), r"unexpected score\.weight"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (clusters(None), "clusters are no palette"),
        (clusters([[0, 0, 0]] * K + [[1, 1]]), "clusters are no palette"),
        (clusters([[0.0, 0.0, 300.0]] * K), "clusters are no palette"),
        (clusters([[0.0, 0.0, 0.5]] * (K - 1)), "10 clusters, and the network has 11 colours"),
        (lambda folder: (folder / "model.safetensors").unlink(), "the download was not finished"),
        (cut("model.safetensors", 5000), "is damaged"),
        (cut("preprocessor_config.json", 40), "is not a JSON file"),
    ],
)
def test_what_is_refused(reference_model: Path, tmp_path: Path, fault: Callable[[Path], None], message: str) -> None:
    folder = copied(reference_model, tmp_path / "bad")
    fault(folder)
    with pytest.raises(ValueError, match=message):
        find_weights(str(folder))


def test_not_a_number(reference_model: Path, tmp_path: Path) -> None:
    folder = copied(reference_model, tmp_path / "bad")
    state(lambda s: s["transformer.wpe.weight"].__setitem__((0, 0), torch.inf))(folder)
    with pytest.raises(ValueError, match="NaN or infinity in wpe"):
        find_weights(str(folder)).net()


def test_code_in_pytorchs_file_is_not_run(reference_model: Path, tmp_path: Path) -> None:
    folder = copied(reference_model, tmp_path / "bad")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Planted(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing in it was run"):
        find_weights(str(folder))
    assert not (tmp_path / "ran").exists()


def test_what_their_format_cannot_hold(tmp_path: Path, net: GPT) -> None:
    """Masked pixels, another order of the pixels: each names the format that can."""
    bert = small_net(causal=False)
    order = [*range(1, R * R), 0]
    for weights, why in (
        (native(tmp_path / "a", bert, objective={"name": "bert", "mask_probability": 0.15}), "masked pixels"),
        (native(tmp_path / "b", net, PixelOrder(R, tuple(order))), "another order"),
    ):
        with pytest.raises(ValueError, match=rf"{why}.*task\.format=igpt"):
            huggingface.write(tmp_path / "hf", weights)
    assert not (tmp_path / "hf").exists()


def test_an_export_is_whole_or_not_there(tmp_path: Path, net: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: an error half way leaves nothing; what is there is not touched."""
    weights = native(tmp_path / "ours", net)
    bad = perturbed(small_net())
    bad.wpe.data[3, 1] = torch.nan  # comes late: the writer has written most of the file by then
    broken = replace(weights, state=lambda: tensors.unwrapped_state(bad.state_dict()))
    with pytest.raises(ValueError, match="NaN"):
        huggingface.write(tmp_path / "hf", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    huggingface.write(tmp_path / "hf", weights)
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(ValueError, match="is there already"):
        huggingface.write(tmp_path / "hf", weights)
    assert {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before


def test_in_parts_as_their_own_code_reads_them(
    tmp_path: Path, net: GPT, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent source: `from_pretrained` on several files and an index; ours reads what theirs writes so."""
    monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)
    huggingface.write(tmp_path / "hf", native(tmp_path / "ours", net))
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    model = opened(tmp_path / "hf")
    with torch.no_grad():
        assert (net(tokens) - their_logits(model, tokens)).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    ImageGPTImageProcessor.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = find_weights(str(tmp_path / "theirs")).net().state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in net.state_dict().items())


def test_what_decides_the_weights_decides_their_hash(reference_model: Path, tmp_path: Path) -> None:
    """Invariant: other colours or heads over the same tensors are other weights: no result of theirs is taken."""
    hashes = {find_weights(str(reference_model)).sha256}
    for name, fault in (("a", clusters(palette().centres[::-1].tolist())), ("b", config(n_head=6))):
        folder = copied(reference_model, tmp_path / name)
        fault(folder)
        hashes.add(find_weights(str(folder)).sha256)
    assert len(hashes) == 3


def test_the_file_that_is_named_is_the_file_that_is_read(reference_model: Path, tmp_path: Path) -> None:
    """Another file of weights beside those that the folder is read by: refused, not replaced in silence."""
    folder = copied(reference_model, tmp_path / "two")
    for name in ("finetuned.safetensors", "pytorch_model.bin", "notes.txt"):
        (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match=r"give the folder|is no checkpoint"):
            find_weights(str(folder / name))


def test_a_name_on_the_hub(reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub gives a folder, whichever files it has; without a network, that is said."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, is_requested = copied(reference_model, tmp_path / "hub"), []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        is_requested.append((name, "pytorch_model.bin" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_weights("openai/imagegpt-small").metadata.network.n_layer == 3
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert find_weights("openai/imagegpt-small").path == folder / "pytorch_model.bin"
    assert is_requested == [("openai/imagegpt-small", which) for which in (False, False, True)]

    def unreachable(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"the Hub, where it might be a model, cannot be reached"):
        find_weights("openai/imagegpt-small")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        ValueError, match="give a finished run folder"
    ):  # a misspelt path of this machine is not asked for
        find_weights("runs/pretrain-typo")
