"""Files that people were sent: nothing in them is executed, opens other files, or takes much more memory than its size.

Each row of `CASES` makes a file or a folder, reads it as a user would, in a process of its own, and names a part of the
one-line error that comes of it (None: it is read). A new row is all that a new case needs.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.data.conftest import png_chunk
from tests.hostile import images as i
from tests.hostile import runs as r
from tests.hostile import weights as w
from tests.hostile.weights import Make

log = logging.getLogger(__name__)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LEAST_BYTES = 1 << 30  # that any file may take
SECONDS = 20  # for one file; the slowest takes 3
LONGEST = 1000  # characters of an error
COUNT = int(os.environ.get("IGPT_HOSTILE_COUNT", "10"))  # changed versions of each good file
SEED = int(os.environ.get("IGPT_HOSTILE_SEED", "0"))


@dataclass(frozen=True)
class Case:
    make: Make
    loader: str
    error: str | None  # part of the message
    marks: tuple[Any, ...] = field(default=())


def weights(make: Make, error: str | None, loader: str = "load") -> Case:
    return Case(make, loader, error)


CASES: dict[str, Case] = {
    # config.json
    "16 million blocks": weights(w.with_config(n_layer=1 << 24), "n_layer must be a whole number of 1 to 4,096"),
    "4,096 blocks": weights(w.with_config(n_layer=4096), "holds 23 tensors, too few for the n_layer=4096"),
    "a width of 16 million": weights(w.with_config(n_embd=3 << 22), "misshapen"),
    "16 million tokens": weights(w.with_config(n_vocab=1 << 24), "tokens of 16777216"),
    "a million positions": weights(w.with_config(n_ctx=1 << 20), "its network reads 1048576 tokens"),
    "16 million positions": weights(w.with_config(n_ctx=1 << 24), "n_ctx must be a whole number of 1 to 1,048,576"),
    "heads that do not divide": weights(w.with_config(n_head=7), "not divisible by n_head 7"),
    "16 million heads": weights(w.with_config(n_head=1 << 24), "not divisible by n_head"),
    "a negative size": weights(w.with_config(n_layer=-1), "n_layer must be a whole number"),
    "a size in letters": weights(w.with_config(n_layer="3"), "n_layer must be a whole number"),
    "a size with a fraction": weights(w.with_config(n_layer=3.0), "n_layer must be a whole number"),
    "a list as a size": weights(w.with_config(n_embd=[24]), "n_embd must be a whole number"),
    "a size that is not a number": weights(w.with_config(n_layer=float("nan")), "n_layer must be a whole number"),
    "an infinite size": weights(w.with_config(n_ctx=float("inf")), "n_ctx must be a whole number"),
    "a long text as a size": weights(w.with_config(n_layer="9" * (4 << 20)), "n_layer must be a whole number"),
    "a long name of a setting": weights(w.with_config(**{"x" * (4 << 20): 1}), "which this version does not know"),
    "a list of positions": weights(w.with_config(positions=["learned"]), "model.positions must be one of"),
    "a long name": weights(w.with_field(model="a" * (4 << 20)), "model is 'aaaa"),
    "a name that leads elsewhere": weights(w.with_field(model="../../x"), "model is '../../x', expected letters"),
    "a long format": weights(w.with_field(format="2" * (4 << 20)), "format '2222"),
    "a step of 4,000 digits": weights(w.with_field(step=10**4000), "step is 1000"),
    "a number of 10,000 digits": weights(
        w.with_text(lambda t: t.replace('"step": 12', f'"step": 1{"0" * 10_000}')), "is not a JSON file"
    ),
    "settings one inside another": weights(
        w.with_text(lambda t: t[:-2] + ', "a": ' + "[" * 100_000), "is not a JSON file"
    ),
    "20 million empty lists": weights(w.with_text(lambda t: "[" + "[]," * 20_000_000 + "0]"), "it is too large"),
    "one wide letter in 100 MB": weights(
        w.with_text(lambda t: f'{{"a": "\N{GRINNING FACE}{"a" * (100 << 20)}"}}'), "it is too large"
    ),
    "a setting twice": weights(
        w.with_text(lambda t: t.replace('"n_layer": 3', '"n_layer": 3, "n_layer": 4000')),
        "too few for the n_layer=4000",
    ),
    "a permutation of a million pixels": weights(
        w.with_field(
            tokenizer={"kind": "palette", "centres": [[0.0] * 3] * 2, "hash": "", "permutation": [*range(1 << 20)]}
        ),
        "the palette's hash is",
    ),
    "patches of a billion pixels": weights(
        w.with_field(
            tokenizer={"kind": "patches", "patch": 10**9, "centres": [[0.0] * 12] * 2, "hash": "", "permutation": [0]}
        ),
        "patches of 1000000000 pixels",
    ),
    # safetensors
    "a header longer than the file": weights(w.safetensors(b"{}", length=1 << 62), "is damaged"),
    "a tensor larger than the file": weights(
        w.safetensors(lambda h: h["wte"].update(shape=[1 << 30, 1 << 30])), "is damaged"
    ),
    "bytes beyond the end": weights(
        w.safetensors(lambda h: h["wte"].update(shape=[11 << 30, 24], data_offsets=[0, (11 << 30) * 96])), "is damaged"
    ),
    "two tensors in the same bytes": weights(
        w.safetensors(lambda h: h["wte"].update(data_offsets=h["wtet"]["data_offsets"])), "is damaged"
    ),
    "a header that is no JSON": weights(w.safetensors(b"[" * 100_000), "is damaged"),
    "50,000 empty tensors": weights(w.empty_tensors, "does not fit"),
    "a tensor with a name of 4 MB": weights(
        w.safetensors(lambda h: h.update({"x" * (4 << 20): h.pop("wte")})), "does not fit"
    ),
    "a tensor whose name moves the cursor": weights(
        w.safetensors(lambda h: h.update({"\x1b[2J\n": h.pop("wte")})), "does not fit"
    ),
    # an index of parts
    "an index that leads upwards": weights(
        w.index("../../outside/private.safetensors"), "which is not a file beside it"
    ),
    "an index with a whole path": weights(w.index("{}/outside/private.safetensors"), "which is not a file beside it"),
    "an index of devices": weights(w.index("/dev/zero"), "which is not a file beside it"),
    # Hugging Face
    "Hugging Face: a million blocks": weights(
        w.hugging_face_with("config.json", n_layer=1 << 20), "n_layer must be a whole number"
    ),
    "Hugging Face: 4,000 blocks": weights(
        w.hugging_face_with("config.json", n_layer=4000), "too few for the n_layer=4000"
    ),
    "Hugging Face: a million positions": weights(w.hugging_face_with("config.json", n_positions=1 << 20), "misshapen"),
    "Hugging Face: 16 million tokens": weights(w.hugging_face_with("config.json", vocab_size=1 << 24), "misshapen"),
    "Hugging Face: colours in colours": weights(
        w.hugging_face_with("preprocessor_config.json", clusters=w.deep_list(500)), "clusters are no palette"
    ),
    "Hugging Face: 100,000 colours": weights(
        w.hugging_face_with("preprocessor_config.json", clusters=[[0, 0, 0]] * 100_000), "clusters are no palette"
    ),
    "Hugging Face: another model": weights(
        w.hugging_face_with("config.json", model_type="x" * (4 << 20)), "model_type 'xxx"
    ),
    "Hugging Face: code in its file": weights(
        w.pytorch_bin(lambda s, f: {**s, "a": w.planted(f)}), "nothing in it was run"
    ),
    "Hugging Face: code in its older file": weights(
        w.pytorch_bin(lambda s, f: {**s, "a": w.planted(f)}, legacy=True), "nothing in it was run"
    ),
    "Hugging Face: numbers seen often": weights(
        w.pytorch_bin(
            lambda s, f: (
                {n: t[..., :1].expand_as(t) for n, t in s.items()} | {"a": s["lm_head.weight"].expand(10_000, -1, -1)}
            )
        ),
        "they repeat numbers",
    ),
    "Hugging Face: a deflated file": weights(
        w.pytorch_bin(lambda s, f: s, rewrite=lambda p: w.deflate(p, 2 << 30)), "would unpack to"
    ),
    # training checkpoints
    "a checkpoint with code": weights(w.checkpoint(lambda c, f: c.update(a=w.planted(f))), "nothing in it was run"),
    "a checkpoint with code, resumed": weights(
        w.checkpoint(lambda c, f: c.update(a=w.planted(f))), "damaged or no checkpoint", "resume checkpoint"
    ),
    "a checkpoint that unpacks to 2 GB": weights(
        w.checkpoint(rewrite=lambda p: w.deflate(p, 2 << 30)), "would unpack to"
    ),
    "a checkpoint that unpacks to 2 GB, resumed": weights(
        w.checkpoint(rewrite=lambda p: w.deflate(p, 2 << 30)), "would unpack to", "resume checkpoint"
    ),
    "a checkpoint of one number seen often": weights(w.checkpoint(w.wide), "they repeat numbers"),
    "a checkpoint of 4,000 blocks": weights(
        w.checkpoint(lambda c, f: c["origin"]["network"].update(n_layer=4000)), "too few for the n_layer=4000"
    ),
    "tensors beyond their storage": weights(w.checkpoint(rewrite=w.beyond_storage), "is damaged|repeat numbers"),
    "members one over the other": weights(w.checkpoint(rewrite=w.overlapping), "would unpack to|is damaged"),
    "a call for 32 GB": weights(
        w.checkpoint(rewrite=w.hand_pickled(b"ctorch\nFloatTensor\n\x8a\x05\x00\x00\x00\x00\x02\x85R")),
        "it wants torch.FloatTensor",
    ),
    "a call for 32 GB of bytes": weights(
        w.checkpoint(rewrite=w.hand_pickled(b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x08\x85R")), "bytearray"
    ),
    "a text that doubles 30 times": weights(
        w.checkpoint(rewrite=w.hand_pickled(w.fast_growth(30))), "it wants _codecs.encode"
    ),
    "five million lists": weights(
        w.checkpoint(rewrite=w.hand_pickled(b"(" + b"]" * 5_000_000 + b"l")), "has more than 4,000,000 operations"
    ),
    "lists that name themselves 2^60 times": weights(
        w.checkpoint(lambda c, f: c["origin"]["network"].update(n_layer=w.shared_lists(60))), "its values name others"
    ),
    # sharded checkpoints
    "code in a sharded checkpoint": weights(
        w.sharded_bytes(".metadata", lambda b, f: w.pickle.dumps(w.planted(f))), "nothing in it was run"
    ),
    "code in a piece": weights(
        w.sharded_bytes("__0_0.distcp", lambda b, f: w.pickle.dumps(w.planted(f)).ljust(len(b), b"\0")), "is damaged"
    ),
    "pieces of a terabyte": weights(w.sharded_with(w.long_pieces), "it is shorter than .metadata says"),
    "a tensor of 4 TB": weights(w.sharded_with(w.giant_tensor), "more numbers than its files hold"),
    "a tensor of 60 dimensions": weights(w.sharded_with(w.many_dimensions), "the shape of state_dict.net.sos is none"),
    "pieces in the same bytes": weights(w.sharded_with(w.same_bytes), "more numbers than its files hold"),
    "10,000 pieces in the same bytes": weights(w.sharded_with(w.many_pieces), "more numbers than its files hold"),
    "pieces elsewhere": weights(
        w.sharded_bytes(".metadata", lambda b, f: b.replace(b"__0_0.distcp", b"../x0.distcp")), "not a file beside it"
    ),
    "a memo of two billion objects": weights(
        w.sharded_bytes(".metadata", lambda b, f: b"\x80\x02K\x01r\xff\xff\xff\x7f."), "counts more objects"
    ),
    "a piece that unpacks to 2 GB": weights(w.deflated_piece, "would unpack to"),
    "a piece that unpacks to 2 GB, resumed": weights(w.deflated_piece, "would unpack to", "resume sharded checkpoint"),
    # class heads
    "a head of a billion classes": weights(w.head_fields(n_class=10**9, class_names=None), "its shape is", "head"),
    "a head with code": weights(
        w.with_head(lambda f: (f / "head.safetensors").write_bytes(w.pickle.dumps(w.planted(f.parent)))),
        "head.safetensors is damaged",
        "head",
    ),
    "classes with long names": weights(
        w.head_fields(class_names=["a" * (4 << 20)] * 3), "class_names is no list", "head"
    ),
    "a head with another field": weights(w.head_fields(**{"x" * (4 << 20): 1}), "head.json is damaged", "head"),
    "a probe with long names": weights(
        w.with_probe(lambda r: r.update(class_names=["a" * (4 << 20)] * 3)), "class_names is no list", "probe"
    ),
    "a probe of millions of names": weights(
        w.with_probe(lambda r: r.update(class_names=[""] * (1 << 22))), "4194304 names", "probe"
    ),
    "a probe with another field": weights(w.with_probe(lambda r: r.update({"x" * (4 << 20): 1})), "no probe", "probe"),
    # palettes and token arrays
    "a palette of a billion colours": weights(w.palette(w.npy("<f4", (1 << 30, 3))), "is no .npy array", "palette"),
    "a palette with code": weights(w.pickled_array, "is no .npy array", "palette"),
    "a palette of records": weights(
        w.palette(w.npy([("a", "<f4"), ("b", "<f4")], (2, 3), data=bytes(48))), "it holds", "palette"
    ),
    "a palette with a deep header": weights(w.palette(w.npy(0, 0, text="[" * 9_000)), "is no .npy array", "palette"),
    "a palette of negative size": weights(
        w.palette(w.npy("<f4", (-1, 3), data=bytes(24))), "is no .npy array", "palette"
    ),
    "a palette of 8 GB": weights(w.palette(w.npy("<f4", (2, 3)), 8 << 30), "at most 1,048,576 are read", "palette"),
    "a palette by columns": weights(w.palette(w.npy("<f4", (2, 3), order=True, data=bytes(24))), None, "palette"),
    "a billion token arrays": weights(w.tokens(w.npy("|u1", (1 << 40, 4))), "is no .npy array", "tokens"),
    "tokens with code": weights(w.tokens(w.npy("|O", (2, 4), data=b"cposix\nsystem\n.")), "is no .npy array", "tokens"),
    "tokens outside the palette": weights(w.tokens(w.npy("<i8", (2, 4), data=b"\xff" * 64)), "has tokens -1", "tokens"),
    "labels of no class": weights(w.tokens(w.GOOD_TOKENS, w.npy("|u1", (2, 0))), "one-hot labels|is no .npy", "tokens"),
    "labels of a billion classes": weights(
        w.tokens(w.GOOD_TOKENS, w.npy("|u1", (2, 1 << 30))), "is no .npy array", "tokens"
    ),
    # images
    "an image of 2.5 billion pixels": Case(i.image(i.BOMB), "images", "it would unpack to more than"),
    "36 million pixels in 100 kB": Case(i.image(i.unpacking()), "images", None),
    "a profile of 1 GB in a picture": Case(
        i.image(i.png_with(png_chunk(b"iCCP", b"a\0\0" + i.deflated(1 << 30)))), "images", None
    ),
    "a text of 1 GB in a picture": Case(
        i.image(i.png_with(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + i.deflated(1 << 30)))), "images", None
    ),
    "a strip of 4 GB": Case(i.image(i.tiff(8, 8, 0xFFFFFFFF), "a.tif"), "images", None),
    "50,000 frames": Case(i.image(i.gif_frames(), "a.gif"), "images", None),
    "a program in PostScript": Case(i.image(i.EPS, "a.jpg"), "images", "are no image in one of the formats"),
    "a PDF": Case(i.image(i.PDF, "a.jpg"), "images", "are no image in one of the formats"),
    "a metafile": Case(i.image(i.WMF, "a.png"), "images", "are no image in one of the formats"),
    "a drawing that names a file": Case(i.image(i.SVG, "a.png"), "images", "are no image in one of the formats"),
    "an image of 8 GB": Case(i.image(i.sparse), "images", "at most 268,435,456 are read"),
    "a pipe": Case(i.image(i.pipe), "images", "it is no regular file"),
    "a link to a device": Case(i.image(i.zeros), "images", "it is no regular file"),
    "bad images left out": Case(i.image(i.BOMB), "images, skip", "1 images read"),
    "a line of 1 GB in a list of labels": Case(
        i.image(lambda p: i.sparse(p), "metadata.jsonl"), "images", "too many to be read"
    ),
    "a deep line in a list of labels": Case(
        i.metadata("metadata.jsonl", "[" * 60_000 + "\n"), "images", "cannot be read"
    ),
    "labels of files elsewhere": Case(
        i.metadata("metadata.csv", "file_name,label\n../../outside/private.png,1\n"), "images", "is no image below"
    ),
    "labels that are lists": Case(
        i.metadata("metadata.jsonl", '{"file_name": "good.png", "label": [1]}\n'),
        "images",
        "expected a whole number or a name",
    ),
    # parquet and tar files
    "cells of 120 MB": Case(
        i.parquet([bytes(40 << 20)] * 3),
        "images",
        "unpacks to more than 100 times its size",
        marks=(pytest.mark.ci,),
    ),
    "one cell seen 500 times": Case(i.many_of_one, "images", "unpacks to more than 100 times its size|cannot be read"),
    "one cell seen 500 times, as a stream": Case(
        i.many_of_one, "images, stream", "are no image|cannot be read|unpacks"
    ),
    "cells that share their beginnings": Case(i.shared_beginnings, "images", "write them as plain values"),
    "30 million empty rows": Case(i.empty_rows, "images", "30,000,000 rows, more than fit in it"),
    "a cell that names a file elsewhere": Case(
        i.parquet_path("{}/outside/private.png"), "images", "which is no file below"
    ),
    "a cell that leads upwards": Case(i.parquet_path("../../outside/private.png"), "images", "which is no file below"),
    "a saved dataset of another's rows": Case(i.saved_elsewhere, "images", "private.arrow"),
    "a member of 8 GB": Case(i.tar(i.member("1.png", size=8 << 30)), "images", "cannot be read|unpacks to more"),
    "a name of 8 GB": Case(i.long_name, "images", "a header claims 8,589,934,592 bytes"),
    "a sparse member": Case(i.tar(i.member("1.png", b"S", 0)), "images", "cannot be read|unpacks to more"),
    "a member that is a link": Case(i.tar(i.member("1.png", b"2", link="/etc/hostname")), "images", "it is a link"),
    "a member that is a device": Case(i.tar(i.member("1.png", b"3")), "images", "it is a link, a device"),
    "a member that is a pipe": Case(i.tar(i.member("1.png", b"6")), "images", "it is a link, a device"),
    # run folders
    "a run's record of 20 million lists": Case(
        r.run_folder("run.json", "[" + "[]," * 20_000_000 + "0]"), "resume", "it is too large"
    ),
    "a run's record, one list in another": Case(
        r.run_folder("run.json", "[" * 100_000), "resume", "is not a JSON file"
    ),
    "a result's record of 20 million lists": Case(
        r.run_folder("result.json", "[" + "[]," * 20_000_000 + "0]", state="finished"), "report", "it is too large"
    ),
    "a run that makes a folder": Case(
        r.with_overrides("+data.more={{_target_: os.mkdir, path: {}/ran}}"), "resume", "never taken from a file"
    ),
    "a run that reads settings elsewhere": Case(
        r.with_overrides("hydra.searchpath=[file://{}/../outside]"), "resume", "never taken from a file"
    ),
    "a run without settings": Case(
        r.run_folder("run.json", lambda record, _: record.update(config={})), "resume", "is no run's"
    ),
    "a result with a picture upwards": Case(r.files_named("../../../outside/private.png"), "report", None),
    "a result with a picture elsewhere": Case(r.files_named("{}/outside/private.png"), "report", None),
}


class Reader:
    """The process that reads: `reader.py`."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.reader"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def read(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    one = Reader()
    yield one
    one.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for the case, beside `outside/`, whose files nothing may open."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "private.png").write_bytes(i.GOOD)
    for name in ("private.safetensors", "private.arrow"):
        (outside / name).write_bytes(b"secret")
    (tmp_path / "case" / "files").mkdir(parents=True)
    return tmp_path / "case" / "files"


def total_size(path: Path) -> int:
    """Bytes of a file, or of all regular files in a folder."""
    paths = [path, *path.parent.glob(f"{path.name}.*")] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in paths if file.is_file() and not file.is_symlink())


@pytest.mark.parametrize("name", [pytest.param(name, marks=case.marks) for name, case in CASES.items()])
def test_a_hostile_file(reader: Reader, place: Path, name: str) -> None:
    """One line of a ValueError, in seconds; nothing run, nothing opened outside, no more memory than promised."""
    case = CASES[name]
    path = case.make(place)
    most_bytes = max(LEAST_BYTES, 2 * total_size(path))
    found = reader.read(
        loader=case.loader,
        path=str(path),
        most_bytes=most_bytes,
        seconds=SECONDS,
        outside=str(place.parents[1] / "outside"),
    )
    assert "died" not in found, found
    log.info("%s: %d MiB", name, found["peak"] >> 20)
    message = found.get("message")
    if case.error is None:
        assert message is None, found
    else:
        assert message is not None, found
        assert found["is_value_error"], found
        assert any(part in message for part in case.error.split("|")), message
        assert "\n" not in message, message
        assert len(message) < LONGEST, message[:2000]
    assert found["peak"] <= most_bytes, f"{found['peak']:,} bytes"
    assert not found["opened_outside"], found
    assert not found["programs"], found
    assert not (place.parent / "ran").exists()


MUTATIONS: dict[str, tuple[Make, str, str, int, int]] = {  # maker, loader, file, bytes at its start and at its end
    "config.json": (w.model, "load", "config.json", 900, 0),
    "safetensors": (w.model, "load", "model.safetensors", 1500, 0),
    "index": (w.in_parts, "load", "model.safetensors.index.json", 1500, 0),
    "Hugging Face's settings": (w.hugging_face, "load", "config.json", 800, 0),
    "Hugging Face's colours": (w.hugging_face, "load", "preprocessor_config.json", 800, 0),
    "training checkpoint": (w.checkpoint(), "load", "", 6000, 2500),
    "training checkpoint, resumed": (w.checkpoint(), "resume checkpoint", "", 6000, 2500),
    "sharded metadata": (w.sharded, "load", ".metadata", 10_000, 0),
    "sharded pieces": (w.sharded, "load", "__0_0.distcp", 4000, 0),
    "rest of a sharded checkpoint": (w.sharded, "load", "meta.pt", 3000, 1500),
    "head": (w.with_head(lambda _: None), "head", "head.json", 400, 0),
    "palette": (w.palette(w.npy("<f4", (2, 3), data=bytes(24))), "palette", "", 90, 0),
    "tokens": (w.tokens(w.GOOD_TOKENS), "tokens", "made_vaX.npy", 90, 0),
    "labels": (w.tokens(w.GOOD_TOKENS), "tokens", "made_vaY.npy", 90, 0),
    "picture": (i.image(i.GOOD), "images", "a.png", 120, 40),
    "parquet": (i.parquet([i.GOOD] * 3), "images", "train.parquet", 60, 900),
    "tar": (i.tar(i.member("1.png")), "images", "train.tar", 700, 0),
    "list of labels": (
        i.metadata("metadata.jsonl", '{"file_name": "good.png", "label": 1}\n'),
        "images",
        "metadata.jsonl",
        40,
        0,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_random_changes_of_a_good_file(reader: Reader, place: Path, name: str) -> None:
    """Invariant: a file with a few bytes flipped, cut out or inserted is read, or refused with a ValueError."""
    make, loader, file, first, last = MUTATIONS[name]
    path = make(place)
    mutate = {"file": file, "first": first, "last": last, "count": COUNT, "seed": SEED}
    outside = str(place.parents[1] / "outside")
    found = reader.read(
        loader=loader, path=str(path), most_bytes=LEAST_BYTES, seconds=60, outside=outside, mutate=mutate
    )
    assert "died" not in found, found
    assert "error" not in found, f"{found}"
    assert found["errors"] > COUNT // 10, found  # the changes are of bytes that matter
    assert found["peak"] <= LEAST_BYTES
    assert not found["opened_outside"], found
    assert not found["programs"], found
