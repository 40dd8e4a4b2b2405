"""A page on this machine alone, on which pictures go on as they are made, under captions that are typed there.

A page holds no script. Its picture is a stream of PNGs of which each replaces the one before, its form answers into a
frame beside it. Imports nothing of ours.
"""
import html
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import count
from urllib.parse import parse_qs

from PIL import Image

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; frame-src 'self'; style-src 'unsafe-inline'; "
                               "form-action 'self'; base-uri 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
}
HEAD = """<!doctype html><meta charset="utf-8"><title>nanovideo</title><link rel="icon" href="data:,">
<style>:root { color-scheme: dark; font: 16px sans-serif } img { height: 75vh; image-rendering: pixelated }</style>
"""
PAGE = """<form action="{path}" method="post" target="answer">
<input name="caption" value="{caption}" size="60" maxlength="1000" autofocus> <button>from now on</button></form>
<iframe name="answer" style="width: 40em; height: 3em; border: 0"></iframe><br>
<img src="{path}" alt="the video, as it is made">
"""


def opened(port):
    """A server on 127.0.0.1, its port open; browsers wait until it serves. ValueError for a port that cannot be had."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Viewer)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port={port}: {error}; 0 takes any that is free") from error


def serve(server, caption, read, videos, fps):
    """Shows videos until Ctrl-C, a stream to each page, at `fps` pictures a second where they are made as fast.

    read(caption) -> what videos are made by, ValueError for a caption that cannot be; `caption` is the first one.
    videos(i, now) -> the videos of page i, one after another, each by what is in now["read"] when it is begun. One
    thread makes those of all pages, each while the one before is shown; it stops when the page is closed.
    """
    server.pages, server.streams = count(), {}      # streams: {path: its `now`}
    server.caption, server.read, server.videos, server.fps = caption, read, videos, fps
    # the settings of torch's compiler are a context's: those of this thread hold for the one that makes the videos
    server.make = partial(ThreadPoolExecutor(1).submit, copy_context().run, next)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    server.streams.clear()
    server.server_close()


def png(picture):
    """The bytes of a picture (h, w, 3) as a file."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "png", compress_level=1)
    return file.getvalue()


class Viewer(BaseHTTPRequestHandler):
    """GET / is a new page, GET /3 the stream of page 3, POST /3 a caption for it."""

    timeout = 60                                    # seconds for which a browser may take or send nothing
    error_message_format = HEAD + "%(explain)s"    # escaped by http.server

    def parse_request(self):
        """Refuses what other sites ask: by a name that they let point here (DNS rebinding), or from their pages."""
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "")
        from_here = (host.partition(":")[0] in ("127.0.0.1", "localhost")
                     and self.headers.get("Origin", f"http://{host}") == f"http://{host}"
                     and self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin"))
        if not from_here:
            self.send_error(403, explain=f"this page is opened as http://127.0.0.1:{self.server.server_port}")
        return from_here

    def do_GET(self):
        if self.path == "/":
            path = f"/{next(self.server.pages)}"
            self.answer(PAGE.format(path=path, caption=html.escape(self.server.caption)))
        elif re.fullmatch(r"/\d{1,9}", self.path):
            self.stream()
        else:
            self.send_error(404, explain="the page is /")

    def do_POST(self):
        size, now = self.headers.get("Content-Length", ""), self.server.streams.get(self.path)
        if now is None:
            return self.send_error(404, explain="this stream has ended: load the page again")
        if not size.isdecimal():
            return self.send_error(411)
        if len(size) > 4:
            return self.send_error(413, explain="a caption has fewer than 10,000 bytes")
        fields = parse_qs(self.rfile.read(int(size)).decode("ascii", "replace"), keep_blank_values=True)
        if "caption" not in fields:
            return self.send_error(400, explain="wanted is a form with a caption")
        caption = fields["caption"][0]
        try:
            now["read"] = self.server.read(caption)
        except ValueError as error:
            return self.send_error(400, explain=str(error))
        self.answer(f"from now on: {html.escape(caption)}")

    def stream(self):
        """Sends picture after picture, each when it is due, until nobody takes them or the server ends."""
        server = self.server
        now = server.streams[self.path] = {"read": server.read(server.caption)}
        videos = server.videos(int(self.path[1:]), now)
        coming, due = server.make(videos), 0
        try:
            self.begin("multipart/x-mixed-replace; boundary=next")
            self.wfile.write(b"--next\r\n")
            while server.streams.get(self.path) is now:
                video = coming.result()
                coming = server.make(videos)
                for picture in video:
                    due = max(due + 1 / server.fps, time.monotonic())
                    time.sleep(max(0, due - time.monotonic()))
                    # the boundary at once, without which browsers wait to show a picture
                    self.wfile.write(b"Content-Type: image/png\r\n\r\n" + png(picture) + b"\r\n--next\r\n")
        finally:
            if server.streams.get(self.path) is now:    # no other has begun in its place
                del server.streams[self.path]

    def answer(self, body):
        self.begin("text/html; charset=utf-8")
        self.wfile.write(f"{HEAD}{body}".encode("utf-8", "replace"))

    def begin(self, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def handle(self):
        with suppress(OSError):     # a browser that has gone
            super().handle()

    def log_message(self, *_):
        """Keeps the terminal quiet."""
