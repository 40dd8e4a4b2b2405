"""viewer.py: pictures on a page that this machine alone sees, until they are not wanted any more."""
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from http.client import HTTPConnection
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import viewer

EVIL = "<script>alert('\"')</script>"
SAFE = "&lt;script&gt;alert("
SETTING = ContextVar("setting", default="unset")


class Videos:
    """Stands for a model: videos of two pictures, as bright as the caption is long; keeps who made them."""

    def __init__(self):
        self.made = []

    def read(self, caption):
        if "never" in caption:
            raise ValueError(f"no such thing: {caption}")
        return len(caption)

    def __call__(self, i, now):
        for n in range(10**6):
            self.made.append((i, threading.get_ident(), SETTING.get()))
            yield np.full((2, 3, 5, 3), [now["read"], i, n % 256], np.uint8)


@contextmanager
def serving(videos, caption="red", fps=500, setting="unset"):
    """-> the server, in a thread of its own."""
    def serve():
        SETTING.set(setting)
        viewer.serve(server, caption, videos.read, videos, fps)

    server, thread = viewer.opened(0), threading.Thread(target=serve)
    server.serve_forever = partial(server.serve_forever, poll_interval=0.01)    # how soon `shutdown` is heard
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def one_server():
    videos = Videos()
    with serving(videos) as server:
        yield server, videos


@pytest.fixture
def videos(one_server):
    """The server's; those that earlier tests asked for have ended."""
    server, videos = one_server
    until(lambda: not server.streams)
    videos.made.clear()
    return videos


@pytest.fixture
def server(one_server, videos):
    return one_server[0]


def asked(server, path, method="GET", body=None, **headers):
    """-> (status, headers, body) of a request; names of headers with _ for -, None for none."""
    connection = HTTPConnection(*server.server_address, timeout=10)
    headers = {"Host": f"127.0.0.1:{server.server_port}"} | {n.replace("_", "-"): v for n, v in headers.items()}
    connection.putrequest(method, path, skip_host=True)
    if body is not None and "Content-Length" not in headers:
        headers["Content-Length"] = len(body)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    answer = response.status, response.headers, "" if is_stream(response) else response.read().decode()
    connection.close()
    response.close()
    return answer


def is_stream(response):
    return response.headers.get_content_type() == "multipart/x-mixed-replace"


@contextmanager
def looking(server, path="/0"):
    """-> next picture of a stream."""
    with socket.create_connection(server.server_address, timeout=10) as line, line.makefile("rb") as file:
        line.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        while file.readline() != b"--next\r\n":
            pass

        def picture():
            kind = file.readline()
            if not kind:
                raise EOFError
            assert (kind, file.readline()) == (b"Content-Type: image/png\r\n", b"\r\n")
            data = b""
            while not data.endswith(b"\r\n--next\r\n"):
                data += file.readline()
                assert len(data) < 100_000
            return np.array(Image.open(BytesIO(data)))

        yield picture


def until(happened):
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def typed(server, caption, path="/0"):
    return asked(server, path, "POST", f"caption={caption}".encode())


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_each_page_has_a_stream_of_its_own_and_a_form_for_it(server):
    first, second = (asked(server, "/") for _ in range(2))
    assert first[0] == 200
    assert first[1]["Content-Type"] == "text/html; charset=utf-8"
    assert 'name="caption" value="red"' in first[2]
    paths = [re.findall(r'<(?:img src|form action)="(/\d+)"', page) for _, _, page in (first, second)]
    assert [len(set(some)) for some in paths] == [1, 1]
    assert [len(some) for some in paths] == [2, 2]
    assert paths[0] != paths[1]


def test_pictures_come_in_their_order_and_not_faster_than_they_are_to_be_shown():
    videos = Videos()
    with serving(videos, fps=25) as server, looking(server, "/7") as picture:
        first, begin = picture(), time.monotonic()
        shown = [first, *(picture() for _ in range(9))]
        assert time.monotonic() - begin > 5 / 25
        assert [tuple(seen[0, 0]) for seen in shown] == [(3, 7, n // 2) for n in range(10)]
        assert shown[0].shape == (3, 5, 3)
        assert len(videos.made) <= 7     # not far ahead of what is shown


def test_a_caption_changes_its_own_stream_from_the_next_video_on(server):
    with looking(server, "/0") as picture, looking(server, "/1") as other:
        assert picture()[0, 0, 0] == 3
        status, _, answer = typed(server, "a+long%20one")
        assert status == 200
        assert "from now on: a long one" in answer
        seen = [picture()[0, 0, [0, 2]].tolist()]
        while seen[-1][0] == 3 and len(seen) < 2000:
            seen.append(picture()[0, 0, [0, 2]].tolist())
        assert seen[-1][0] == 10
        assert seen[-1][1] - seen[0][1] == len(seen) // 2       # it goes on, it does not begin again
        assert other()[0, 0, 0] == 3


def test_one_thread_makes_all_videos_with_the_settings_of_the_thread_that_serves():
    videos = Videos()
    with serving(videos, setting="set") as server, looking(server, "/0") as picture, looking(server, "/1") as other:
        picture(), other()
    assert {i for i, _, _ in videos.made} == {0, 1}
    assert len({thread for _, thread, _ in videos.made}) == 1
    assert {setting for _, _, setting in videos.made} == {"set"}


def test_a_stream_that_is_asked_for_again_begins_again_and_the_one_before_it_ends(server):
    with looking(server) as before:
        before()
        with looking(server) as picture:
            with pytest.raises(EOFError):
                for _ in range(2000):
                    before()
            picture()
            assert typed(server, "longer")[0] == 200
            while picture()[0, 0, 0] == 3:
                pass


def test_a_page_that_is_closed_ends_its_work_in_silence(server, videos, capfd):
    with looking(server) as picture:
        picture()
        assert server.streams.keys() == {"/0"}
    until(lambda: not server.streams)
    made = len(videos.made)
    time.sleep(0.05)
    assert len(videos.made) <= made + 1
    assert typed(server, "red")[0] == 404
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_browser_shows_the_pictures_and_has_nothing_to_complain_of(tmp_path):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium here: apt-get install chromium")
    with serving(Videos(), caption="a" * 200, fps=20) as server:
        seen = subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,600",
             f"--screenshot={tmp_path / 'shot.png'}", f"http://localhost:{server.server_port}/"],
            capture_output=True, text=True, timeout=60)
    shot = np.array(Image.open(tmp_path / "shot.png"))
    assert (shot[..., 0] == 200).sum() > 100 * 100      # 3 x 5 pixels, enlarged
    assert "CONSOLE" not in seen.stderr


# ---- who may ask, and what ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", "/0"), ("POST", "/0"), ("PUT", "/")])
@pytest.mark.parametrize("headers", [
    dict(Host="evil.example:8000"), dict(Host="127.0.0.1.evil.example"), dict(Host=None),
    dict(Origin="http://evil.example"), dict(Origin="null"), dict(Origin="http://127.0.0.1:1"),
    dict(Origin="https://127.0.0.1"), dict(Sec_Fetch_Site="cross-site"), dict(Sec_Fetch_Site="same-site")], ids=str)
def test_other_sites_and_names_are_refused_before_any_work(server, videos, method, path, headers):
    status, _, answer = asked(server, path, method, b"caption=x" if method == "POST" else None, **headers)
    assert status == 403
    assert f"this page is opened as http://127.0.0.1:{server.server_port}" in answer
    assert videos.made == []


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "localhost:{}", "localhost:9", "localhost"])
def test_its_own_pages_are_served_by_either_name_and_through_a_tunnel(server, host):
    host = host.format(server.server_port)
    for headers in ({}, {"Origin": f"http://{host}"}, {"Sec_Fetch_Site": "same-origin"}, {"Sec_Fetch_Site": "none"}):
        assert asked(server, "/", Host=host, **headers)[0] == 200


@pytest.mark.parametrize("status, method, path, headers", [
    (404, "GET", "/favicon.ico", {}), (404, "GET", "/../etc/passwd", {}), (404, "GET", "/" + "1" * 10, {}),
    (404, "POST", "/", {}), (404, "POST", "/5", {}),
    (501, "PUT", "/0", {}), (501, "DELETE", "/0", {}), (501, "HEAD", "/", {}), (501, "OPTIONS", "/0", {}),
    (414, "GET", "/" + "1" * 70000, {}), (431, "GET", "/", {"Long": "x" * 70000}),
    (413, "POST", "/0", {"Content-Length": "10000"}), (413, "POST", "/0", {"Content-Length": "9" * 5000}),
    (411, "POST", "/0", {"Content-Length": None}), (411, "POST", "/0", {"Content-Length": "-1"}),
    (400, "POST", "/0", {})], ids=lambda value: f"{value}"[:12])
def test_what_is_not_to_be_asked_is_refused(server, status, method, path, headers):
    with looking(server):
        body = b"none" if method == "POST" else None
        answer = asked(server, path, method, body, **headers)
        assert answer[0] == status


def test_what_is_shown_is_escaped_and_no_page_runs_scripts_or_stands_in_anothers_frame():
    with serving(Videos(), caption=EVIL) as server, looking(server):
        answers = [asked(server, "/"),
                   *(typed(server, said) for said in (EVIL, "never" + EVIL, "never%0d%0aX:1"))]
    assert [status for status, _, _ in answers] == [200, 200, 400, 400]
    for _, headers, text in answers:
        assert "<script" not in text
        assert headers["X"] is None
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'self'" in headers["Content-Security-Policy"]
    assert 'value="&lt;script&gt;alert(&#x27;&quot;&#x27;)' in answers[0][2]
    assert f"from now on: {SAFE}" in answers[1][2]
    assert f"no such thing: never{SAFE}" in answers[2][2]


def test_bytes_that_are_no_text_are_taken_for_marks(server):
    with looking(server):
        for body in ("%ff%00", "\u20ac"):
            assert typed(server, body)[0] == 200


# ---- beginning and end ----------------------------------------------------------------------------------------------

def test_it_is_bound_to_this_machine_alone_and_refuses_a_port_that_cannot_be_had(server):
    assert server.server_address[0] == "127.0.0.1"
    for port in (server.server_port, 70000, -1):
        with pytest.raises(ValueError, match=f"--port={port}: .*; 0 takes any that is free"):
            viewer.opened(port)


def test_ctrl_c_ends_it_and_frees_the_port_while_somebody_looks(ctrl_c, capfd):
    videos, server = Videos(), viewer.opened(0)

    def look():
        with looking(server) as picture:
            try:
                picture()
            finally:
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(EOFError):
                for _ in range(2000):
                    picture()
            ended.append(True)

    ended, thread = [], threading.Thread(target=look)
    thread.start()
    viewer.serve(server, "red", videos.read, videos, 500)
    viewer.opened(server.server_port).server_close()
    thread.join()
    assert ended
    assert capfd.readouterr().err == ""
