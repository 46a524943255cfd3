"""``f2pad serve``: answers images over HTTP, with FastAPI."""

import argparse
import asyncio
import base64
import contextlib
import functools
import io
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Bool, UInt8

from f2pad_jax._version import __version__
from f2pad_jax.commands._archive import Record
from f2pad_jax.commands._console import at_least
from f2pad_jax.commands._live import Live, reason
from f2pad_jax.commands._refine_files import ALL, Reported, judged
from f2pad_jax.commands._refine_options import add_method, add_model, detector_with_maps, method_options
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import F2padError, OptionError
from f2pad_jax.images.files import read_image
from f2pad_jax.inpainting._choice import INPAINTERS
from f2pad_jax.method.algorithm import Refined
from f2pad_jax.refinement import refine_many
from f2pad_jax.regions.measure import run_lengths

PAGE = Path(__file__).with_name("serve.html")
"""Page to try the service in a browser."""
MaskForm = Literal["png", "rle", "none"]
"""Form of the mask in an answer."""


class Limits(NamedTuple):
    """Limits of a service. Together they bound its memory."""

    num_images: int = 32
    """Largest number of images that are accepted at a time."""
    max_bytes: int = 100_000_000
    """Largest size of an image's file, or of a request."""
    max_pixels: int = 40_000_000
    """Largest number of pixels of an image."""


LIMITS = Limits()
"""Default limits."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_model(parser)
    text = "address to listen at; 0.0.0.0 is every address of this machine, and there is no password (default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=at_least(0), default=8000, metavar="N", help="port (default: %(default)s)")
    text = "folder whose images requests may name by a path (default: no path is accepted)"
    parser.add_argument("--root", type=Path, metavar="DIR", help=text)
    text = "image of the line: the programs for images of its size are compiled before the first request "
    text += "(default: a normal image of the model)"
    parser.add_argument("--example", type=Path, metavar="FILE", help=text)
    text = "largest number of images that are accepted at a time; the next one is refused (default: %(default)s)"
    parser.add_argument("--queue", type=at_least(1), default=LIMITS.num_images, metavar="N", help=text)
    text = "largest size of a request or a file (default: %(default)s)"
    parser.add_argument("--max-bytes", type=at_least(1), default=LIMITS.max_bytes, metavar="N", help=text)
    text = "largest number of pixels of an image (default: %(default)s)"
    parser.add_argument("--max-pixels", type=at_least(1), default=LIMITS.max_pixels, metavar="N", help=text)
    add_method(parser)


def run(arguments: argparse.Namespace) -> None:
    """Serves until an interrupt or SIGTERM; the images that are accepted then still get their answers.

    Raises:
        OptionError: the extra ``serve`` is missing, ``--root`` is no folder, or the port is taken.
        ImageError: the example can't be used.
    """
    try:
        import uvicorn
    except ImportError:
        raise OptionError("serving needs FastAPI and Uvicorn; run: pip install 'f2pad-jax[serve]'") from None
    if arguments.root is not None and not arguments.root.is_dir():
        raise OptionError(f"{arguments.root}: no such folder; --root must name the folder of the images")
    limits = Limits(arguments.queue, arguments.max_bytes, arguments.max_pixels)
    detector, options = detector_with_maps(arguments), method_options(arguments)
    example = arguments.example and read_image(arguments.example, white=detector.calibrated.white)
    app = application(detector, root=arguments.root, example=example, limits=limits, **options)
    try:
        listening = socket.create_server((arguments.host, arguments.port))
    except OSError as error:
        raise OptionError(f"{arguments.host}:{arguments.port}: {error.strerror}; give another --host or --port") from None
    host, port = listening.getsockname()[:2]
    print(f"serving {arguments.model} at http://{host}:{port}; Ctrl-C ends", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # Uvicorn raises the signal once more, after the last answer
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning")).run(sockets=[listening])


def application(
    detector: AbstractDetector,
    *,
    root: Path | None = None,
    example: UInt8[np.ndarray, "h w 3"] | None = None,
    limits: Limits = LIMITS,
    reported: Reported = ALL,
    inpaint: str = INPAINTERS[0],
    **options: Any,
) -> Any:
    """Returns the service as a FastAPI application, whose images go through the lanes of one stream.

    Args:
        detector: fitted detector.
        root: folder whose images requests may name by a path; None: no path is accepted.
        example: image whose programs are compiled first.
        limits: limits of the service.
        reported: regions that the answers have.
        inpaint: name of the inpainter.
        options: further options of ``refine_many``.
    """
    import prometheus_client as prometheus
    from fastapi import Body, FastAPI, HTTPException, UploadFile
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, JSONResponse, Response

    live = Live(functools.partial(refine_many, detector, inpaint=inpaint, **options))
    warm = live.submit(defective_example(detector) if example is None else with_square(example))
    white, root = detector.calibrated.white, root and root.resolve()
    metrics = prometheus.CollectorRegistry()
    prometheus.ProcessCollector(registry=metrics)
    verdicts = prometheus.Counter("f2pad_images", "Images by verdict.", ["verdict"], registry=metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(live.close)

    # the pages of FastAPI's documentation load scripts of other sites
    app = FastAPI(
        title="f2pad", version=__version__, lifespan=lifespan, max_body_size=limits.max_bytes, docs_url=None, redoc_url=None
    )
    app.add_middleware(Gate, num_images=limits.num_images, metrics=metrics)

    async def answered(name: str, data: bytes, form: MaskForm) -> Response:
        try:
            pixels = await run_in_threadpool(read_image, name, white=white, data=data, max_pixels=limits.max_pixels)
            result = await asyncio.wrap_future(live.submit(pixels))
        except F2padError as error:
            raise HTTPException(422, str(error)) from None
        except Exception as error:
            raise HTTPException(500, f"{name}: the image could not be refined ({reason(error)})") from None
        record = await run_in_threadpool(answer, name, result, inpaint, reported, form)
        verdicts.labels(record["verdict"]).inc()
        return Response(await run_in_threadpool(json.dumps, record), media_type="application/json")

    @app.post("/refine", summary="Refines an uploaded image")
    async def refine_upload(image: UploadFile, mask: MaskForm = "png") -> Response:
        return await answered(image.filename or "image", await image.read(), mask)

    @app.post("/refine/path", summary="Refines an image in the folder of --root")
    async def refine_path(path: Annotated[str, Body(embed=True)], mask: MaskForm = "png") -> Response:
        try:
            data = await run_in_threadpool(read_inside, root, path, limits.max_bytes)
        except Refusal as refusal:
            raise HTTPException(*refusal.args) from None
        return await answered(path, data, mask)

    @app.get("/health", summary="Answers 200 when the programs for one image are compiled")
    def health() -> Response:
        if not warm.done():
            return JSONResponse({"status": "compiling"}, 503)
        if error := warm.exception():
            return JSONResponse({"status": f"the example failed ({reason(error)})"}, 503)
        return JSONResponse({"status": "ready", "version": __version__})

    @app.get("/metrics", summary="Figures for Prometheus")
    def figures() -> Response:
        return Response(prometheus.generate_latest(metrics), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app


class Gate:
    """Middleware that refuses an image before its body is read, if too many are accepted already, and counts requests."""

    def __init__(self, app: Any, num_images: int, metrics: Any):
        import prometheus_client as prometheus

        self.app, self.num_images, self.num_accepted = app, num_images, 0
        self.requests = prometheus.Counter("f2pad_requests", "Requests by status.", ["status"], registry=metrics)
        self.seconds = prometheus.Histogram("f2pad_request_seconds", "Time of a request.", registry=metrics)
        queue = prometheus.Gauge("f2pad_queue_images", "Images without an answer.", registry=metrics)
        queue.set_function(lambda: self.num_accepted)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request, or hands it to the application."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        from fastapi.responses import JSONResponse

        began, status = time.perf_counter(), 500

        async def counted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        full = self.num_accepted >= self.num_images
        self.num_accepted += not full
        try:
            if full:
                text = f"{self.num_images} images have no answer yet; send this image again"
                await JSONResponse({"detail": text}, 429, headers={"Retry-After": "1"})(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        finally:
            self.num_accepted -= not full
            self.requests.labels(status).inc()
            self.seconds.observe(time.perf_counter() - began)


class Refusal(Exception):
    """Status and reason for which a path is refused."""


def read_inside(root: Path | None, path: str, max_bytes: int) -> bytes:
    """Reads a file below ``root``, which is resolved. Links inside ``root`` may not lead out of it.

    Raises:
        Refusal: no path is accepted, the path leads out of ``root``, there is no such file, or the file is too large.
    """
    if root is None:
        raise Refusal(403, "no path is accepted; start 'f2pad serve' with --root")
    try:
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise Refusal(403, f"{path}: this path leads out of the folder of --root")
        if not file.is_file():
            raise Refusal(404, f"{path}: no such file")
        if file.stat().st_size > max_bytes:
            raise Refusal(413, f"{path}: more than {max_bytes} bytes")
        return file.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # such as a loop of links, or a name with a null byte
        raise Refusal(404, f"{path}: can't be read ({reason(error)})") from None


def answer(name: str, result: Refined, inpaint: str, reported: Reported, form: MaskForm) -> Record:
    """Returns the record of an image, as ``f2pad refine --json`` prints it, with the mask in place of the files."""
    figures, mask = judged(result, inpaint, reported)
    return {"image": name, "name": Path(name).stem} | ({} if form == "none" else {"mask": encoded(mask, form)}) | figures


def encoded(mask: Bool[np.ndarray, "h w"], form: MaskForm) -> str | dict[str, list[int]]:
    """Returns a mask as a PNG in Base64, or as run lengths of COCO."""
    if form == "rle":
        size = (mask.shape[0], mask.shape[1])
        return {"size": list(size), "counts": run_lengths(mask, (0, 0), size) if mask.any() else [mask.size]}
    buffer = io.BytesIO()
    PIL.Image.fromarray(mask).save(buffer, "PNG")  # one bit for each pixel
    return base64.b64encode(buffer.getvalue()).decode()


def defective_example(detector: AbstractDetector) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a normal image of the model with a defect, or grey of the detector's size if the model has no image."""
    normals = detector.calibrated.normals
    return with_square(np.full((*detector.size, 3), 128, np.uint8) if normals is None else np.array(normals[0]))


def with_square(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a copy with the negative of the image in a square of an eighth of the shorter side, in the middle."""
    height, width = image.shape[:2]
    side = min(height, width) // 8
    top, left = (height - side) // 2, (width - side) // 2
    changed = image.copy()
    changed[top : top + side, left : left + side] = 255 - image[top : top + side, left : left + side]
    return changed
