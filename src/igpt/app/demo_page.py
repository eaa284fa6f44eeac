"""The Gradio page of `task=demo`: widgets and event handlers. The operations are in `workbench`."""

import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.http_server import start_server
from starlette.middleware import Middleware

from igpt.app.demo_guard import RequestGuard, UploadFolder
from igpt.app.workbench import DemoImage, Workbench
from igpt.distributed.process_state import environment
from igpt.report.page import templates

INTRO = (
    "The network draws an image pixel by pixel, row by row from the top. Choose an image, say how many of its rows are "
    "given, and watch it draw the rest; or see which training images a layer finds most like it."
)
THEME = gr.themes.Default(
    primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
AT_MOST = 10.0  # maximal seconds a click waits for a running drawing to end
PIECES: Any = templates().get_template("demo.html").module  # HTML macros with autoescape


class Turn:
    """A running drawing of one visitor; another thread stops it with `wanted = False`."""

    def __init__(self) -> None:
        self.wanted = True
        self.over = threading.Event()


class DemoPage:
    """The event handlers: each returns the new values of its output widgets."""

    def __init__(self, bench: Workbench, uploads: UploadFolder) -> None:
        self.bench, self.uploads = bench, uploads
        self.turns: dict[str | None, Turn] = {}  # session → its running drawing
        self.sessions: set[str | None] = set()  # open pages

    def enter(self, request: gr.Request) -> None:
        """Notes the visitor's page."""
        self.sessions.add(request.session_hash)

    def end(self, request: gr.Request) -> None:
        """Ends the visitor's drawing when the page is closed; removes uploads when it was the last page."""
        self.leave(request)
        self.sessions.discard(request.session_hash)
        if not self.sessions:
            self.uploads.remove_all()

    async def check_uploaded(self, path: str) -> str:
        """The path of an uploaded file. Raises ValueError for another one, or a URL, which Gradio would fetch."""
        if not Path(path).resolve().is_relative_to(self.uploads.path.resolve()):
            raise ValueError("an uploaded file is expected")
        return path

    def stop(self, request: gr.Request) -> None:
        """Stops the visitor's drawing after the current pixel."""
        if turn := self.turns.get(request.session_hash):
            turn.wanted = False

    def leave(self, request: gr.Request) -> None:
        """Stops the visitor's drawing and waits until it has ended, at most AT_MOST seconds."""
        if turn := self.turns.pop(request.session_hash, None):
            turn.wanted = False
            turn.over.wait(AT_MOST)

    def others(self, page: int) -> tuple[int, Any]:
        """Shows the next held-out images."""
        return page + 1, gr.Gallery([image.pixels for image in self.bench.choices(page + 1)], selected_index=None)

    def select_held_out(self, page: int, rows: float, event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        """Chooses the held-out image that was clicked."""
        self.leave(request)
        chosen = self.bench.choices(page)[event.index]
        return self._choose(chosen, rows, f"{chosen.name} is chosen.")

    def select_upload(self, file: str | None, rows: float, request: gr.Request) -> tuple[Any, ...]:
        """Chooses the image of an uploaded file, and deletes the file."""
        self.leave(request)
        try:
            if file is None:
                raise ValueError("No file has come.")
            chosen = self.bench.read_upload(Path(file))
        except (ValueError, OSError) as error:
            unchanged = [gr.skip()] * (4 + (self.bench.classifier is not None))
            return PIECES.note(str(error), problem=True), *unchanged
        finally:
            if file is not None:
                Path(file).unlink(missing_ok=True)
        return self._choose(chosen, rows, "Your image was cut and resized as the data's are.")

    def _choose(self, chosen: DemoImage, rows: float, message: str) -> tuple[Any, ...]:
        """Outputs after a choice: a message, image, given rows, no completions, no nearest images; and classes."""
        classes = [] if self.bench.classifier is None else [self.bench.classify(chosen)]
        return PIECES.note(message), chosen, self.show_prompt(chosen, rows), "", "", *classes

    def show_prompt(self, chosen: DemoImage, rows: float) -> str:
        """HTML of the image as decoded from its tokens, and of its given rows."""
        there = self.bench.prompt_rows(round(rows))
        full = self.bench.show_prompt(chosen, self.bench.side)
        shown = (full, chosen.name, self.add_label("as its tokens show it", chosen.label))
        cut = (self.bench.show_prompt(chosen, round(rows)), "given", f"{there} of {self.bench.side} rows")
        return str(PIECES.tiles("the image", [shown, cut]))

    def add_label(self, text: str, label: int) -> str:
        """The text, and the class name if there is one."""
        return ", ".join(filter(None, (text, self.bench.class_name(label))))

    def complete(
        self, chosen: DemoImage, rows: float, completions: float, temperature: float, top_k: float,
        seed: float | None, request: gr.Request,
    ) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """Yields the completions and a status line after each row."""
        self.leave(request)
        turn = self.turns[request.session_hash] = Turn()
        side, begun, there = self.bench.side, time.perf_counter(), 0.0
        try:
            steps = self.bench.complete(
                chosen, rows=round(rows), completions=round(completions), seed=round(seed or 0),
                temperature=temperature, top_k=round(top_k) or None, wanted=lambda: turn.wanted,
            )  # fmt: skip
            for pixels, there in steps:
                seconds = time.perf_counter() - begun
                pace = f", {seconds / (there - rows):.2f} s a row" if there > rows else ""
                finished = f"All {side} rows are there, drawn in {seconds:.1f} s{pace}."
                message = finished if there == side else f"Row {there:g} of {side}{pace}."
                tiles = [(image, f"completion {i}", "") for i, image in enumerate(pixels, start=1)]
                yield PIECES.tiles("completions", tiles), PIECES.note(message)
            if there < side and self.turns.get(request.session_hash) is turn:  # else the visitor has left it
                yield gr.skip(), PIECES.note("Stopped.")
        except ValueError as error:
            yield gr.skip(), PIECES.note(str(error), problem=True)
        finally:
            turn.over.set()

    def nearest(self, chosen: DemoImage, layer: float) -> Iterator[tuple[Any, str]]:
        """Yields the progress of reading the training images, then the nearest ones; each with a status line."""
        try:
            for nearest in self.bench.nearest(chosen, layer=round(layer), k=self.bench.settings.nearest):
                if isinstance(nearest, tuple):
                    read, total = nearest
                    yield gr.skip(), PIECES.note(f"Reading training images, this once: {read:,} of {total:,}.")
                else:
                    tiles = [
                        (of.pixels, of.name, self.add_label(f"cosine {of.cosine:.3f}", of.label)) for of in nearest
                    ]
                    message = f"Layer {layer:g}, among {len(self.bench.training.rows):,} training images."
                    yield PIECES.tiles("nearest training images", tiles), PIECES.note(message)
        except ValueError as error:
            yield gr.skip(), PIECES.note(str(error), problem=True)


def build(bench: Workbench, about: Mapping[str, str], uploads: UploadFolder) -> gr.Blocks:
    """The page with its event handlers."""
    page, settings, side, depth = DemoPage(bench, uploads), bench.settings, bench.side, bench.net.n_layer
    first, rows, layer = bench.choices(0), settings.rows or 0, settings.layer or 0
    limit = f"An upload has at most {settings.upload_mb:g} MB, and is cut to the square the network reads."
    with gr.Blocks(title="igpt demo", analytics_enabled=False) as blocks:
        chosen, shelf = gr.State(first[0]), gr.State(0)
        gr.HTML(PIECES.facts("Image GPT", INTRO, about))
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=4, min_width=320):
                gr.HTML(f'<h2 class="part">Held-out images ({settings.split})</h2>')
                gallery = gr.Gallery(
                    [image.pixels for image in first], show_label=False, columns=6, allow_preview=False,
                    height="auto", object_fit="contain", buttons=[], interactive=False, elem_classes="choices",
                    elem_id="choices", format="png", selected_index=0,
                )  # fmt: skip
                with gr.Row():
                    small: dict[str, Any] = {"size": "sm", "min_width": 120}
                    others = gr.Button("Other images", **small)
                    upload = gr.UploadButton("Upload an image", file_types=["image"], elem_id="upload", **small)
                    upload.async_move_resource_to_block_cache = page.check_uploaded
                gr.HTML(f'<p class="hint">{limit}</p>')
                given_rows = gr.Slider(0, side, rows, step=1, label="Rows given, from the top", elem_id="rows")
                completions = gr.Slider(1, settings.at_most, settings.completions, step=1, label="Completions")
                warmth = {"label": "Temperature", "info": "below 1: safer; above: wilder"}
                temperature = gr.Slider(0.1, 2, settings.temperature, step=0.05, **warmth)
                likely = {"label": "Top-k", "info": "likeliest colours only; 0: any"}
                top_k = gr.Slider(0, bench.net.n_vocab, settings.top_k or 0, step=1, **likely)
                seed = gr.Number(bench.data.seed, label="Seed", precision=0, info="the same seed draws the same")
            with gr.Column(scale=5, min_width=320):
                gr.HTML('<h2 class="part">Completion</h2>')
                with gr.Row():
                    complete = gr.Button("Complete", variant="primary", min_width=120, elem_id="complete")
                    stop = gr.Button("Stop", min_width=120, elem_id="stop")
                message = gr.HTML(PIECES.note(""), elem_id="said")
                given = gr.HTML(page.show_prompt(first[0], rows), elem_id="given")
                drawn = gr.HTML("", elem_id="drawn")
                classes = []
                if bench.classifier is not None:
                    gr.HTML('<h2 class="part">Class</h2>')
                    shown = bench.classify(first[0])
                    classes = [gr.Label(shown, show_label=False, container=False, elem_id="classes")]
                gr.HTML('<h2 class="part">Nearest training images</h2>')
                layers = gr.Slider(0, depth, layer, step=1, label="Layer", info=f"0: the embedding; {depth}: the last")
                look = gr.Button("Find", elem_id="find")
                about_found = gr.HTML(PIECES.note(""), elem_id="about-found")
                found = gr.HTML("", elem_id="found")

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        requested = [chosen, given_rows, completions, temperature, top_k, seed]
        complete.click(page.complete, requested, [drawn, message], concurrency_limit=1, **quiet)
        stop.click(page.stop, None, None, **quiet)
        look.click(page.nearest, [chosen, layers], [found, about_found], concurrency_limit=None, **quiet)
        others.click(page.others, shelf, [shelf, gallery], **quiet)
        of_choice = [message, chosen, given, drawn, found, *classes]
        gallery.select(page.select_held_out, [shelf, given_rows], of_choice, **quiet)
        upload.upload(page.select_upload, [upload, given_rows], of_choice, **quiet)
        given_rows.release(page.show_prompt, [chosen, given_rows], given, **quiet)
        blocks.load(page.enter, None, None, **quiet)
        blocks.unload(page.end)
    return blocks


@contextmanager
def serve(bench: Workbench, about: Mapping[str, str], uploads: UploadFolder) -> Iterator[str]:
    """Serves the page for the block, to requests of its own; yields its URL.

    No analytics, no share link, no other address. No file is served but those in the folder that holds `uploads`, to
    which the page's images are written.

    Raises:
        ValueError: a host that is not this machine's, or a port in use.
    """
    settings = bench.settings
    host, port = settings.host, settings.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        raise ValueError(
            f"no page can be served at task.host={host} task.port={port} ({error.strerror or error}): choose another "
            "port, or null for a free one; the host is an address of this machine"
        ) from error
    folder = str(uploads.path.parent)
    # settings that Gradio reads only from the environment, or sets there itself
    env = {"GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    with environment(**env, HF_HUB_DISABLE_TELEMETRY="True"):
        blocks = build(bench, about, uploads)
        blocks.queue(max_size=32, api_open=False)
        guard = Middleware(RequestGuard, host=host, hosts=settings.allowed_hosts, uploads=uploads)
        app = FastAPI(middleware=[guard], openapi_url=None)
        gr.mount_gradio_app(
            app, blocks, "/", max_file_size=uploads.file_bytes, footer_links=[], run_history=False, pwa=False,
            mcp_server=False, ssr_mode=False, enable_monitoring=False, theme=THEME,
            css_paths=Path(__file__).with_suffix(".css"),
        )  # fmt: skip
        gradio_app: Any = app.routes[-1]
        gradio_app.app.uploaded_file_dir = str(uploads.path)
        _, _, url, server = start_server(app, host, port)
        try:
            yield url
        finally:  # an open page would delay the shutdown for seconds and log errors
            server.config.timeout_graceful_shutdown = 1
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            blocks.app, blocks.server = gradio_app.app, server
            blocks.close(verbose=False)
