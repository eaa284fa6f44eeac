"""The page of `task=demo`, made with Gradio: what is seen and clicked. What it does is in `workbench`."""

import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from igpt.app.tiles import facts, note, tile, tiles
from igpt.app.workbench import MEBIBYTE, Chosen, Workbench
from igpt.global_state import environment

INTRO = (
    "The network draws an image pixel by pixel, row by row from the top. Choose an image, say how many of its rows are "
    "given, and watch it draw the rest; or see which training images a layer finds most like it."
)
THEME = gr.themes.Default(
    primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
AT_MOST = 10.0  # seconds that a click waits for a pixel to be finished


@dataclass(frozen=True)
class Start:
    """What the page shows when it is opened."""

    choices: int  # held-out images at a time
    rows: int  # given
    completions: int
    temperature: float
    top_k: int | None
    seed: int
    nearest: int  # training images shown
    layer: int


class Turn:
    """One drawing for one visitor, from another thread to be stopped."""

    def __init__(self) -> None:
        self.wanted = True
        self.over = threading.Event()


class Page:
    """What happens when something is clicked: every answer is what the parts of the page are to show."""

    def __init__(self, bench: Workbench, start: Start) -> None:
        self.bench, self.start = bench, start
        self.turns: dict[str, Turn] = {}  # of each visitor, the drawing that is under way

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's drawing after its pixel."""
        turn = self.turns.get(str(request.session_hash))
        if turn is not None:
            turn.wanted = False

    def leave(self, request: gr.Request) -> None:
        """The same, and waits until nothing of it can come any more."""
        self.stop(request)
        turn = self.turns.pop(str(request.session_hash), None)
        if turn is not None:
            turn.over.wait(AT_MOST)

    def thumbnails(self, page: int) -> list[np.ndarray]:
        return [chosen.pixels for chosen in self.bench.choices(page, self.start.choices)]

    def others(self, page: int) -> tuple[int, Any]:
        """The next held-out images."""
        return page + 1, gr.Gallery(self.thumbnails(page + 1), selected_index=None)

    def held_out(self, page: int, rows: float, event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        """One of them was clicked."""
        self.leave(request)
        chosen = self.bench.choices(page, self.start.choices)[event.index]
        return chosen, self.given(chosen, rows), "", "", note(f"{chosen.name} is chosen.")

    def uploaded(self, file: str | None, rows: float, request: gr.Request) -> tuple[Any, ...]:
        """A file has come."""
        self.leave(request)
        try:
            if file is None:
                raise ValueError("No file has come.")
            chosen = self.bench.uploaded(Path(file))
        except (ValueError, OSError) as error:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), note(str(error), problem=True)
        finally:
            if file is not None:
                Path(file).unlink(missing_ok=True)
        return chosen, self.given(chosen, rows), "", "", note("Your image was cut and resized as the data's are.")

    def given(self, chosen: Chosen, rows: float) -> str:
        """The image as the network is shown it, and what of it is given."""
        there = self.bench.given_rows(round(rows))
        shown = [
            tile(self.bench.quantised(chosen), chosen.name, self.labelled("as its tokens show it", chosen.label)),
            tile(self.bench.given(chosen, round(rows)), "given", f"{there} of {self.bench.side} rows"),
        ]
        return tiles(shown, "the image")

    def labelled(self, text: str, label: int) -> str:
        """The text, and the class if there is one."""
        return ", ".join(part for part in (text, self.bench.class_name(label)) if part)

    def complete(
        self, chosen: Chosen, rows: float, completions: float, temperature: float, top_k: float, seed: float | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """Completions and a line about them, row by row."""
        self.leave(request)
        turn = self.turns[str(request.session_hash)] = Turn()
        side, begun, drawn = self.bench.side, time.perf_counter(), None
        try:
            steps = self.bench.complete(
                chosen,
                rows=round(rows),
                completions=round(completions),
                seed=round(seed or 0),
                temperature=temperature,
                top_k=round(top_k) or None,
                wanted=lambda: turn.wanted,
            )
            for drawn in steps:
                seconds = time.perf_counter() - begun
                pace = f", {seconds / (drawn.rows - rows):.2f} s a row" if drawn.rows > rows else ""
                said = f"Row {drawn.rows:g} of {side}{pace}."
                if drawn.finished:
                    said = f"All {side} rows are there, drawn in {seconds:.1f} s{pace}."
                made = [tile(pixels, f"completion {i + 1}") for i, pixels in enumerate(drawn.pixels)]
                yield tiles(made, "completions"), note(said)
            if drawn is None or not drawn.finished:
                yield gr.skip(), note("Stopped.")
        except ValueError as error:
            yield gr.skip(), note(str(error), problem=True)
        finally:
            turn.over.set()

    def nearest(self, chosen: Chosen, layer: float) -> Iterator[tuple[Any, str]]:
        """The training images most like the chosen one, and a line about them; while they are read, how far that is."""
        try:
            for found in self.bench.nearest(chosen, layer=round(layer), k=self.start.nearest):
                if isinstance(found, tuple):
                    yield gr.skip(), note(f"Reading training images, this once: {found[0]:,} of {found[1]:,}.")
                    continue
                made = [
                    tile(one.pixels, f"training image {one.row}", self.labelled(f"cosine {one.cosine:.3f}", one.label))
                    for one in found
                ]
                among = len(self.bench.training.rows)
                yield tiles(made, "nearest training images"), note(f"Layer {layer:g}, among {among:,} training images.")
        except ValueError as error:
            yield gr.skip(), note(str(error), problem=True)


def build(bench: Workbench, about: Mapping[str, str], start: Start) -> gr.Blocks:
    """The page."""
    page, side, depth = Page(bench, start), bench.side, bench.net.n_layer
    first = bench.choices(0, start.choices)[0]
    limit = (
        f"An upload has at most {bench.uploads.max_bytes / MEBIBYTE:g} MB, and is cut to the square the network reads."
    )
    with gr.Blocks(title="igpt demo", analytics_enabled=False) as blocks:
        chosen, shelf = gr.State(first), gr.State(0)
        gr.HTML(facts("Image GPT", about, INTRO))
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=4, min_width=320):
                gr.HTML(f'<h2 class="part">Held-out images ({bench.split_name})</h2>')
                gallery = gr.Gallery(
                    page.thumbnails(0), show_label=False, columns=6, allow_preview=False, height="auto",
                    object_fit="contain", buttons=[], interactive=False, elem_classes="choices",
                    elem_id="choices", format="png", selected_index=0,
                )  # fmt: skip
                with gr.Row():
                    others = gr.Button("Other images", size="sm", min_width=120)
                    upload = gr.UploadButton(
                        "Upload an image", file_types=["image"], size="sm", min_width=120, elem_id="upload"
                    )
                gr.HTML(f'<p class="hint">{limit}</p>')
                rows = gr.Slider(0, side, start.rows, step=1, label="Rows given, from the top", elem_id="rows")
                completions = gr.Slider(1, bench.at_most, start.completions, step=1, label="Completions")
                temperature = gr.Slider(
                    0.1, 2, start.temperature, step=0.05, label="Temperature", info="below 1: safer; above: wilder"
                )
                top_k = gr.Slider(
                    0, bench.net.n_vocab, start.top_k or 0, step=1, label="Top-k", info="likeliest colours only; 0: any"
                )
                seed = gr.Number(start.seed, label="Seed", precision=0, info="the same seed draws the same")
            with gr.Column(scale=5, min_width=320):
                gr.HTML('<h2 class="part">Completion</h2>')
                with gr.Row():
                    complete = gr.Button("Complete", variant="primary", min_width=120, elem_id="complete")
                    stop = gr.Button("Stop", min_width=120, elem_id="stop")
                said = gr.HTML(note(""), elem_id="said")
                given = gr.HTML(page.given(first, start.rows), elem_id="given")
                drawn = gr.HTML("", elem_id="drawn")
                gr.HTML('<h2 class="part">Nearest training images</h2>')
                layer = gr.Slider(
                    0, depth, start.layer, step=1, label="Layer", info=f"0: the embedding; {depth}: the last"
                )
                look = gr.Button("Find", elem_id="find")
                about_found = gr.HTML(note(""), elem_id="about-found")
                found = gr.HTML("", elem_id="found")

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        settings = [chosen, rows, completions, temperature, top_k, seed]
        complete.click(page.complete, settings, [drawn, said], concurrency_limit=1, **quiet)
        stop.click(page.stop, None, None, **quiet)
        look.click(page.nearest, [chosen, layer], [found, about_found], concurrency_limit=None, **quiet)
        others.click(page.others, shelf, [shelf, gallery], **quiet)
        of_choice = [chosen, given, drawn, found, said]
        gallery.select(page.held_out, [shelf, rows], of_choice, **quiet)
        upload.upload(page.uploaded, [upload, rows], of_choice, **quiet)
        rows.release(page.given, [chosen, rows], given, **quiet)
        blocks.unload(page.leave)
    return blocks


@contextmanager
def serving(
    bench: Workbench, about: Mapping[str, str], start: Start, *, host: str, port: int | None, place: Path
) -> Iterator[str]:
    """The address of the page, which is there while the block lasts. Uploaded files are kept in `place`.

    Nothing is told to anybody: no analytics, no share link, no address but this one.

    Raises:
        ValueError: a host that is not this machine's, or a port that is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        raise ValueError(
            f"no page can be served at task.host={host} task.port={port} ({error.strerror or error}): choose another "
            "port, or null for a free one; the host is an address of this machine"
        ) from error
    # what Gradio can be told in no other way, and what it then sets itself
    told = {"GRADIO_TEMP_DIR": str(place), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "True"}
    with environment(**told):
        blocks = build(bench, about, start)
        blocks.queue(max_size=32, api_open=False)
        try:
            _, url, _ = blocks.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                max_file_size=bench.uploads.max_bytes, footer_links=[], run_history=False, pwa=False,
                mcp_server=False, ssr_mode=False, enable_monitoring=False, theme=THEME,
                css_paths=Path(__file__).with_name("page.css"),
            )  # fmt: skip
            yield url
        finally:
            if blocks.is_running:  # an open page would hold up the end for many seconds, and end in complaints
                blocks.server.config.timeout_graceful_shutdown = 1
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            blocks.close(verbose=False)
