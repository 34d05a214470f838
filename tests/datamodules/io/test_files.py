"""Where data lie, and downloads that resume and are checked, from a server that cuts connections."""

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedl2p.datamodules.io.files import ENVIRONMENT, data_folder, download, missing_data, with_bar
from fedl2p.errors import DataError

CONTENT = bytes(range(256)) * 40_000  # 10 MB
SUM = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, from where it is asked to start; `cut` is the number of bytes after which it hangs up."""

    cut: int | None = None
    ranges = True
    requests: list[str | None] = []  # noqa: RUF012  # reset by the fixture

    def do_GET(self) -> None:
        self.requests.append(self.headers.get("Range"))
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match.group(1)) if match and self.ranges else 0
        if self.path != "/file":
            self.send_error(404)
            return
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.cut])

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "requests", [])
    monkeypatch.setattr(Handler, "cut", None)
    monkeypatch.setattr(Handler, "ranges", True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/file"
        server.shutdown()
        thread.join()


def test_a_file_is_fetched_whole(address: str, tmp_path: Path) -> None:
    download(address, tmp_path / "deep" / "file", sha256=SUM)
    assert (tmp_path / "deep" / "file").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_off_goes_on(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr(Handler, "ranges", ranges)
    monkeypatch.setattr(Handler, "cut", 3_000_000)
    with pytest.raises(DataError, match="Run again to go on"):
        download(address, tmp_path / "file", sha256=SUM)
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "file.part").stat().st_size == 3_000_000
    monkeypatch.setattr(Handler, "cut", None)
    download(address, tmp_path / "file", sha256=SUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert Handler.requests == [None, "bytes=3000000-"]


def test_a_part_that_is_whole_already_is_used(address: str, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    download(address, tmp_path / "file", sha256=SUM)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_another_file_than_the_published_one_is_not_kept(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the file that was published"):
        download(address, tmp_path / "file", sha256="0" * 64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [("/file", "/other"), ("127.0.0.1", "nowhere.invalid")])
def test_what_cannot_be_fetched_says_how_to_go_on(address: str, tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=rf"cannot be downloaded: .*put it at {tmp_path}/file\."):
        download(address.replace(*change), tmp_path / "file", sha256=SUM)
    assert not (tmp_path / "file").exists()


def test_the_place_of_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_folder("/there", "name") == Path("/there")
    assert data_folder("~/there", "name") == Path.home() / "there"
    monkeypatch.setenv(ENVIRONMENT, "/all")
    assert data_folder(None, "name") == Path("/all/name")
    monkeypatch.delenv(ENVIRONMENT)
    assert data_folder(None, "name") == Path("data/name")


def test_missing_data_name_the_file_the_source_and_the_settings() -> None:
    message = str(missing_data("Stars", looked_for="/all/stars.npz", get="Look up."))
    assert message == (
        "Stars is not there: /all/stars.npz is missing. Look up. Another place can be named by data.init_args.root, or "
        "for all data sets by the environment variable FEDL2P_DATA."
    )


def test_items_pass_a_bar_in_order_and_nothing_is_shown_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(with_bar([3, 1, 2], "Counting")) == [3, 1, 2]
    assert capsys.readouterr() == ("", "")
