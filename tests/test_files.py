"""support/files.py: writes that are whole or not there, reads that are checked, and one writer a
folder."""

import errno
import hashlib
import json
import multiprocessing
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools import ROOT

from support import files
from support.files import (
    locked,
    open_file,
    plain_name,
    read_bytes,
    read_json,
    remove_leftovers,
    same_folder,
    sync,
    write_file,
)
from support.script import UserError

NONE = type(None)


@pytest.fixture(autouse=True)
def warnings_not_given_yet():
    files._warn_once.cache_clear()


@pytest.fixture
def canary(tmp_path):
    """A private file outside the folder under attack; checked at the end of the test."""
    file = tmp_path / "canary"
    file.write_bytes(b"private")
    file.chmod(0o600)
    earlier = file.stat()
    yield file
    later = file.stat()
    assert file.read_bytes() == b"private"
    assert (later.st_mode, later.st_mtime_ns) == (earlier.st_mode, earlier.st_mtime_ns)


# ---------------------------------------------------------------------------------------- writing


def test_write_file_returns_the_hash_of_what_is_in_the_file(tmp_path):
    digest = write_file(tmp_path / "a", b"one", memoryview(b"two"))
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert digest == hashlib.sha256(b"onetwo").hexdigest()
    assert os.listdir(tmp_path) == ["a"]


def test_a_written_file_has_the_mode_that_the_umask_allows(tmp_path):
    previous = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    write_file(tmp_path / ("n" * 255), b"x")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"x"


def test_write_file_replaces_a_link_and_not_what_it_points_to(tmp_path, canary):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "a"
    file.symlink_to(canary)
    write_file(file, b"new")
    assert not file.is_symlink() and file.read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_names_the_file_and_keeps_the_old_content(tmp_path, monkeypatch, call, code):
    write_file(tmp_path / "a", b"old")

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError) as caught:
        write_file(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "a") and caught.value.errno == code
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("code", sorted(files.UNSUPPORTED))
def test_a_folder_that_cannot_be_flushed_gives_one_warning(tmp_path, monkeypatch, capsys, code):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fail)
    sync(tmp_path)
    sync(tmp_path)
    assert capsys.readouterr().err.count("cannot flush a directory") == 1


def test_a_folder_whose_disk_fails_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "disk")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        sync(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_leftovers_go_and_what_links_point_to_stays(tmp_path, canary):
    folder = tmp_path / "run"
    (folder / ".step_000001.tmp" / "inner").mkdir(parents=True)
    (folder / ".step_000001.tmp" / "inner" / "link").symlink_to(canary)
    (folder / ".0123.tmp").write_text("half")
    (folder / ".link.tmp").symlink_to(canary)
    (folder / ".folder.tmp").symlink_to(tmp_path, target_is_directory=True)
    (folder / ".dangling.tmp").symlink_to("nowhere")
    (folder / "kept.tmp").write_text("another program's")
    remove_leftovers(folder)
    assert os.listdir(folder) == ["kept.tmp"]


# ---------------------------------------------------------------------------------------- reading

SHAPE = {
    "step": int,
    "loss": (int, float),
    "note?": (str, NONE),
    "shards": [{"name": str}],
    "files": {str: {"size": int}},
    "deep": {"flag": bool},
}
GOOD = {
    "step": 5,
    "loss": 2.5,
    "shards": [{"name": "a"}, {"name": "b"}],
    "files": {"model": {"size": 10}},
    "deep": {"flag": True},
    "other": [[1, "x"]],
}


def test_a_file_of_the_shape_is_returned_as_it_is(tmp_path):
    for value in (GOOD, GOOD | {"note": None, "loss": 2}, GOOD | {"files": {}, "shards": []}):
        (tmp_path / "a.json").write_text(json.dumps(value))
        assert read_json(tmp_path / "a.json", SHAPE) == value


@pytest.mark.parametrize(
    "change, named",
    [
        ({"step": 5.0}, "'step' is a decimal number, not an integer"),
        ({"step": True}, "'step' is true or false, not an integer"),
        ({"step": 10**18 * 10}, "'step' is an integer of more than 64 bits"),
        ({"loss": "2.5"}, "'loss' is a string, not an integer or a decimal number"),
        ({"loss": float("nan")}, "not finite"),
        ({"other": [float("inf")]}, "not finite"),
        ({"note": 3}, "'note' is an integer, not a string or null"),
        ({"shards": {}}, "'shards' is an object, not a list"),
        ({"shards": [{"name": "a"}, {}]}, r"'shards'\[1\].name is missing"),
        ({"shards": [5]}, r"'shards'\[0\] is an integer, not an object"),
        ({"files": {"model": {"size": "x"}}}, r"'files'\['model'\].size is a string"),
        ({"files": []}, "'files' is a list, not an object"),
        ({"deep": {"flag": 1}}, "'deep'.flag is an integer, not true or false"),
        ({"deep": None}, "'deep' is null, not an object"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_key(tmp_path, change, named):
    (tmp_path / "a.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(UserError, match=f"a.json: .*{named}"):
        read_json(tmp_path / "a.json", SHAPE)


def test_a_number_too_large_for_a_float_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"loss": 1e999}')
    with pytest.raises(UserError, match="a.json: a number that is not finite"):
        read_json(tmp_path / "a.json", {"loss": float})


def test_a_missing_key_is_named(tmp_path):
    for key in SHAPE:
        if not key.endswith("?"):
            (tmp_path / "a.json").write_text(json.dumps({k: GOOD[k] for k in GOOD if k != key}))
            with pytest.raises(UserError, match=f"key '{key}' is missing"):
                read_json(tmp_path / "a.json", SHAPE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b"\xff\xfe",
        b'{"step": "\xff"}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": 1e999}',
        "{}".encode("utf-16"),
        b" " * (2**20 + 1),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_not_such_json_is_refused_with_the_file_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json: "):
        read_json(tmp_path / "a.json", SHAPE)


def test_the_lines_of_a_log_come_with_what_they_hold(tmp_path):
    lines = [b'{"step": 1}', b"", b"[1]", b"\xff", b"[" * 200_000, b'{"step": 2']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    entries = [{"step": 1}, None, None, None, None, None]
    assert list(files.read_jsonl(tmp_path / "log.jsonl")) == list(zip(lines, entries, strict=True))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(key=st.sampled_from(sorted(GOOD)), value=json_values)
def test_any_value_in_any_place_is_accepted_or_refused(tmp_path_factory, key, value):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(GOOD | {key: value}))
    try:
        assert read_json(file, SHAPE)[key] == value
    except UserError as error:
        assert "any.json" in str(error)


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    for file in (tmp_path / "fifo", tmp_path / "folder", tmp_path / "link", "/dev/zero"):
        with pytest.raises(UserError, match=f"{file}: not a regular file"):
            open_file(file)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="a.json: No such file"):
        read_json(tmp_path / "a.json", {})


def test_a_link_to_a_regular_file_is_read(tmp_path):
    """The hub's cache is made of links."""
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json", {}) == {}


def test_a_file_over_the_limit_is_not_read_further(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", limit=5) == b"12345"
    with pytest.raises(UserError, match="more than 4 bytes"):
        read_bytes(tmp_path / "a", limit=4)


# ---------------------------------------------------------------------------------------- names


def test_plain_names_stay_in_their_folder():
    for name in ("model.safetensors", "a b", "é.bin", ".x", "..."):
        assert plain_name(name), name
    for name in (
        "",
        ".",
        "..",
        "../a",
        "/a",
        "a/b",
        "a\\b",
        "C:a",
        "a\0",
        "a\n",
        "\ud800",
        "\u202e",
    ):
        assert not plain_name(name), name


def test_same_folder_looks_at_places_not_at_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    for other in ("data/", "./data", tmp_path / "data", "link", "link/../data"):
        assert same_folder("data", other)
    assert same_folder("not/there", "./not/there/")
    assert not same_folder("data", ".") and not same_folder("data", "other")


# ---------------------------------------------------------------------------------------- locking


def try_lock(folder):
    """Whether another process can lock the folder, and what it says if not."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom support.script import run_script\n"
        "from support.files import locked\n"
        "def main():\n    with locked(Path(sys.argv[1])): pass\n"
        "run_script(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stderr


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    with locked(tmp_path / "run"):
        code, message = try_lock(tmp_path / "run")
        assert code == 2 and f"in use by process {os.getpid()} on " in message
    assert try_lock(tmp_path / "run") == (0, "")


@pytest.mark.parametrize(
    "content, said",
    [(b"\xff", "another process"), (b"", "another process"), (b"x\x1b]52", r"x\x1b]52")],
)
def test_a_holder_that_cannot_be_read_is_another_process(tmp_path, content, said):
    with locked(tmp_path):
        (tmp_path / ".lock-holder").write_bytes(content)
        code, message = try_lock(tmp_path)
    assert code == 2 and f"in use by {said};" in message


def hold_and_die(folder):
    with locked(folder):
        os._exit(9)


def test_a_process_that_died_holds_nothing(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("name", [".lock", ".lock-holder"])
def test_the_lock_writes_through_no_link(tmp_path, canary, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(canary)
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_locks_gives_one_warning(tmp_path, monkeypatch, capsys, code):
    def fail(self, timeout):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.FileLock, "acquire", fail)
    for _ in range(2):
        with locked(tmp_path):
            pass
    assert capsys.readouterr().err.count("has no locks") == 1


def test_a_folder_that_may_not_be_written_is_an_error_that_names_the_lock(tmp_path, monkeypatch):
    def fail(self, timeout):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.FileLock, "acquire", fail)
    with pytest.raises(OSError) as caught, locked(tmp_path):
        pass
    assert caught.value.filename == str(tmp_path / ".lock")


def test_a_full_disk_does_not_keep_the_lock_from_being_held(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_file", fail)
    with locked(tmp_path):
        assert try_lock(tmp_path)[0] == 2
