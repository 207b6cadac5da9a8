"""documents.py: one rule for all formats: what is read, what is skipped, and where to go on."""

import csv
import gzip
import json
import os
import random
import re
import struct
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from support import documents
from support.documents import Row, expand, read_files
from support.script import UserError

END = "<|endoftext|>"


def make_documents(n: int, seed: int = 0) -> list[str]:
    """Random text with what tends to go wrong: empty documents, runs, NUL, line ends, emoji."""
    rng = random.Random(seed)
    words = ["the", " quick", "Fox's", "\n\n", "  ", "naïve", "日本", "🙂", "1234", "\0", "\t"]
    words += ["def f(x):", ".", ",", "a" * 50]
    return ["".join(rng.choices(words, k=rng.randrange(60))) for _ in range(n)]


def rows(path: str | Path, text_column="text", split_on="", position=None) -> list[Row]:
    files, _ = expand([str(path)])
    return list(read_files(files, text_column, split_on, position))


def texts(*args, **how) -> list:
    """Each document of a path, or the reason why it is skipped, in brackets."""
    return [
        row.document if isinstance(row.document, str) else [row.document.reason]
        for row in rows(*args, **how)
    ]


# ------------------------------------------------------------------------------------- formats


def write_csv(file: Path, names: list, table: list, delimiter: str = ",") -> None:
    with open(file, "w", newline="") as opened:
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerow(names)
        writer.writerows(table)


def write_arrow(file: Path, table: pyarrow.Table, new=pyarrow.ipc.new_stream) -> None:
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)


def write_every_format(folder: Path, documents: list[str]) -> dict[str, dict]:
    """The same documents in every format, and how each is read."""
    import zstandard

    items = [{"id": i, "body": text} for i, text in enumerate(documents)]
    lines = "".join(json.dumps(item) + "\n" for item in items).encode()
    table = pyarrow.table({"body": documents})
    (folder / "texts").mkdir()
    for i, text in enumerate(documents):
        (folder / f"texts/{i:04d}.txt").write_bytes(text.encode())
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.JSONL").write_bytes(lines)
    (folder / "c.ndjson").write_bytes(lines)
    (folder / "lines.json").write_bytes(lines)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))
    (folder / "e.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "objects.json").write_text(json.dumps(items, indent=1))
    (folder / "strings.json").write_text(json.dumps(documents))
    (folder / "array.json.gz").write_bytes(gzip.compress(json.dumps(items).encode()))
    write_csv(folder / "f.csv", ["id", "body"], list(enumerate(documents)))
    write_csv(folder / "g.TSV", ["id", "body"], list(enumerate(documents)), "\t")
    write_csv(folder / "semicolons.csv", ["id", "body"], list(enumerate(documents)), ";")
    (folder / "h.csv.gz").write_bytes(gzip.compress((folder / "f.csv").read_bytes()))
    pyarrow.parquet.write_table(table, folder / "i.PARQUET", row_group_size=30)
    write_arrow(folder / "stream.arrow", table)
    write_arrow(folder / "file.arrow", table, pyarrow.ipc.new_file)
    dictionary = pyarrow.table({"body": pyarrow.array(documents).dictionary_encode()})
    write_arrow(folder / "dictionary.arrow", dictionary)
    (folder / "k.text").write_bytes(f"\n{END}\n".join(documents).encode())
    (folder / "l.text.gz").write_bytes(gzip.compress((folder / "k.text").read_bytes()))
    how = {name: {"text_column": "body"} for name in FORMATS.split()}
    how["k.text"] = how["l.text.gz"] = {"split_on": f"\\n{END}\\n"}
    return how


FORMATS = (
    "texts texts/*.txt a.jsonl b.JSONL c.ndjson lines.json d.jsonl.gz e.jsonl.zst objects.json"
    " strings.json array.json.gz f.csv g.TSV semicolons.csv h.csv.gz i.PARQUET stream.arrow"
    " file.arrow dictionary.arrow k.text l.text.gz"
)


@pytest.mark.parametrize("name", FORMATS.split())
def test_every_format_gives_the_documents_from_every_position(tmp_path, monkeypatch, name):
    """A source that is opened again at any of its positions goes on exactly there."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 700)
    expected = [*make_documents(100), "last"]
    how = write_every_format(tmp_path, expected)[name]
    found = rows(tmp_path / name, **how)
    assert [row.document for row in found] == expected
    assert len({row.place for row in found}) == len(found)
    fractions = [row.fraction for row in found]
    assert fractions == sorted(fractions) and fractions[-1] <= 1
    for i in (0, 1, 39, 40, 41, 99, 100):
        position = json.loads(json.dumps(found[i].position))
        rest = rows(tmp_path / name, **how, position=position)
        assert [row[:3] for row in rest] == [row[:3] for row in found[i + 1 :]]


def test_progress_in_a_compressed_file_is_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    lines = [
        json.dumps({"text": f"{random.Random(i).getrandbits(120):030x}"}) for i in range(99_999)
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    found = rows(tmp_path / "a.jsonl.gz")
    for part in (0.25, 0.5, 0.75):
        assert abs(found[int(part * 99_999)].fraction - part) < 0.2


def test_files_of_several_formats_are_one_corpus(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "c.txt").write_text("four")
    (tmp_path / "d.csv").write_text("")
    found = rows(tmp_path)
    assert [row.document for row in found] == ["one", "two", "three", "four"]
    assert [row.place for row in found] == ["a.parquet:1", "a.parquet:2", "b.jsonl:18", "c.txt"]


def test_a_row_group_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST_ROW_GROUP_BYTES", 10_000)
    table = pyarrow.table({"text": [f"{i} " * 50 for i in range(200)], "other": ["x" * 999] * 200})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    assert len(rows(tmp_path / "a.parquet")) == 200
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=200)
    with pytest.raises(UserError, match=r"a.parquet: a row group with [0-9,]+ bytes of text"):
        rows(tmp_path / "a.parquet")


# ------------------------------------------------------------------------- what cannot be used


def write_values(file: Path, values: list, name: str = "text") -> None:
    """The values as the rows of a file, whose kind is its suffix."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({name: value}) + "\n" for value in values))
    elif file.suffix == ".json":
        file.write_text(json.dumps([{name: value} for value in values]))
    elif file.suffix == ".csv":
        write_csv(file, ["id", name], [[i, value] for i, value in enumerate(values)])
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({name: values}), file)
    else:
        write_arrow(file, pyarrow.table({name: values}))


KINDS = ["a.jsonl", "a.json", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", [*KINDS, "a.csv"])
def test_a_missing_column_is_skipped_row_by_row(tmp_path, name):
    """As it may be in one of several files. What there is instead is said."""
    write_values(tmp_path / name, ["one", "two"], "body")
    found = rows(tmp_path / name)
    assert [row.document.reason for row in found] == ["missing text"] * 2
    assert re.search("which has (id, )?body$", found[0].document.place)


@pytest.mark.parametrize("name", KINDS)
def test_nulls_numbers_and_structs_are_skipped_by_one_rule(tmp_path, name):
    write_values(tmp_path / name, [None, "one", None])
    assert texts(tmp_path / name) == [["missing text"], "one", ["missing text"]]
    write_values(tmp_path / name, [42, 43])
    assert [reason for (reason,) in texts(tmp_path / name)] in (
        ["int instead of text"] * 2,
        ["int64 instead of text"] * 2,
    )
    write_values(tmp_path / name, [{"a": 1}])
    (((reason,)),) = texts(tmp_path / name)
    assert reason.endswith(" instead of text")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_column_without_any_text_is_one_of_nulls(tmp_path, name):
    write_values(tmp_path / name, [None] * 200)
    assert texts(tmp_path / name) == [["missing text"]] * 200


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_a_document_that_is_not_utf_8_is_skipped_and_its_neighbours_are_not(tmp_path, name):
    file = tmp_path / name
    column = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    elif name == "a.arrow":
        write_arrow(file, pyarrow.table({"text": column}))
    elif name == "a.jsonl":
        file.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n{"text": "fine"}\n')
    elif name == "a.txt":
        file.write_bytes(b"good|\xff|fine")
    else:
        file.write_bytes(b"text\ngood\n\xff\nfine\n")
    assert texts(file, split_on="|") == ["good", ["not UTF-8"], "fine"]


def test_an_offset_outside_of_an_arrow_column_is_an_error_and_no_crash(tmp_path):
    write_values(tmp_path / "a.arrow", ["good", "fine"])
    content = (tmp_path / "a.arrow").read_bytes()
    offsets = struct.pack("<3i", 0, 4, 8)
    assert content.count(offsets) == 1
    damaged = content.replace(offsets, struct.pack("<3i", 0, 2**30, 8))
    (tmp_path / "a.arrow").write_bytes(damaged)
    with pytest.raises(UserError, match="a.arrow: "):
        rows(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", ["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.zst", "e.csv"])
def test_a_document_that_is_too_long_is_skipped_with_its_place(tmp_path, monkeypatch, name):
    """And its neighbours are not. It is longer than what is read at once."""
    monkeypatch.setattr(documents, "MOST_DOCUMENT_BYTES", 2**16)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2**14)
    contents = ["good", "long " * 2**14, "fine"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in contents).encode()
    file = tmp_path / name
    kind = name.split(".")[1]
    if kind == "csv":
        file.write_text("text\n" + "\n".join(contents))
    else:
        compression = documents.COMPRESSIONS.get(file.suffix)
        with pyarrow.output_stream(str(file), compression=compression) as out:
            out.write("|".join(contents).encode() if kind == "txt" else lines)
    assert texts(file, split_on="|") == ["good", ["too long"], "fine"]
    place = {"txt": "byte 5", "jsonl": "byte 17"}.get(kind, "row 2")
    assert rows(file, split_on="|")[1].document.place == f"{file}, {place}"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.json"])
def test_a_file_that_is_read_as_a_whole_may_be_longer(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "MOST_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(documents, "MOST_FILE_BYTES", 10_000)
    for size, expected in ((9000, "x" * 9000), (11_000, ["too long"])):
        content = json.dumps(["x" * size]) if name == "a.json" else "x" * size
        compressed = gzip.compress if name.endswith(".gz") else bytes
        (tmp_path / name).write_bytes(compressed(content.encode()))
        assert texts(tmp_path / name) == [expected]


def test_a_run_without_a_space_that_tiktoken_cannot_hold_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST_RUN", 1000)
    monkeypatch.setattr(documents, "PART_CHARACTERS", 100)
    (tmp_path / "a.txt").write_text("x" * 999 + " y\n\n" + "x" * 1200)
    assert texts(tmp_path / "a.txt", split_on="\\n\\n") == [
        "x" * 999 + " y",
        [documents.ENDLESS_RUN.reason],
    ]


# -------------------------------------------------------------------------------- text and JSON


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("split_on", ["\\n\\n", "\\n--\\n"])
def test_a_separator_of_lines_is_found_whatever_the_line_endings(
    tmp_path, monkeypatch, ending, split_on
):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 3)
    separator = split_on.replace("\\n", ending)
    (tmp_path / "a.txt").write_bytes(separator.join(["one", "two", "three"]).encode())
    assert texts(tmp_path / "a.txt", split_on=split_on) == ["one", "two", "three"]


def test_a_carriage_return_may_be_part_of_the_separator(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n\nstill two")
    assert texts(tmp_path / "a.txt", split_on="\\r\\n\\r\\n") == ["one", "two\n\nstill two"]


def test_the_mark_of_windows_editors_is_no_part_of_a_text(tmp_path):
    for name, content in (("a.txt", "one"), ("a.json", '["one"]'), ("a.csv", "text\none\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert texts(tmp_path / name) == ["one"]


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"text": "one",\n "id": 1}', ["one"]),
        ('{"text": "one"}', ["one"]),
        ('{"text": "one"}\n{"text": "two"}\n\n', ["one", "two"]),
        ('[{"text": "one"},\n {"id": 2}, "three", 4]', ["one", ["missing text"], "three"]),
        ("[1, 2", [["not JSON"]]),
        ("[" * 200_000, [["not JSON"]]),
        ("// settings\n{}", [["not JSON"]]),
        ("", []),
    ],
)
def test_a_json_file_is_a_value_an_array_or_lines(tmp_path, content, expected):
    (tmp_path / "a.json").write_text(content)
    assert texts(tmp_path / "a.json")[: len(expected)] == expected


def test_a_quote_that_is_never_closed_is_an_error_with_the_name_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.csv").write_text('text\none\n"two\n' + "three\n" * 1000)
    with pytest.raises(UserError, match="a.csv: field larger"):
        rows(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_damaged_file_is_an_error_with_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>")
    with pytest.raises(UserError, match=f"{name}: .*; mend it or leave it out"):
        rows(tmp_path / name)


# ------------------------------------------------------------------------------------ which files

NOT_TEXT = "a.pdf b.DOCX c.zip d.exe e.png f.tar.gz g.parquet.gz h.safetensors i.xlsx j.mp3"


@pytest.mark.parametrize("name", NOT_TEXT.split())
def test_what_is_not_text_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("looks like text")
    with pytest.raises(UserError, match=f"{name}: .* cannot be read"):
        rows(tmp_path / name)


@pytest.mark.parametrize("name", ["a.py", "b.c", "c.tex", "d.html", "Makefile", "e.MD", "f.odd"])
def test_source_files_of_any_name_are_text(tmp_path, name):
    (tmp_path / name).write_text("int x;")
    assert texts(tmp_path / name) == ["int x;"]


def test_a_folder_is_read_as_all_its_texts_and_the_rest_is_counted(tmp_path):
    folder = tmp_path / "my-novels"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "cover.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("no")
    (folder / "more/b.MD").write_text("two")
    (folder / "more/c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    (folder / "more/d.csv").write_text("text\nfour\n")
    (folder / "more/e.json").write_text('["five"]')
    (folder / "more/f.py").write_text("six")
    (folder / "more/g.text").write_text("seven")
    (folder / "more/loop").symlink_to(folder)
    expected = ["one", "two", "three", "four", "five", "six", "seven"]
    for spelling in (folder, f"{folder}/", f"{tmp_path}/./my-novels", f"{folder}/**"):
        assert texts(spelling) == expected
        assert expand([str(spelling)])[1] == {".png": 1}


def test_each_file_is_taken_once_however_often_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("g")
    for name in "ab":
        Path(f"g/{name}.txt").write_text(name)
    files, _ = expand(["g/*", "g/b.txt", "./g/a.txt", "g"])
    assert [(file.path, file.place) for file in files] == [
        ("g/a.txt", "a.txt"),
        ("g/b.txt", "b.txt"),
    ]


def test_globs_find_files_in_folders_with_brackets_and_do_not_follow_circles(tmp_path, monkeypatch):
    folder = tmp_path / "novels [1850] *"
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/b.txt").write_text("two")
    (folder / "a.txt").write_text("one")
    (folder / ".c.txt").write_text("hidden")
    os.mkfifo(folder / "d.txt")
    for name in ("x", "y"):
        (folder / f"deep/{name}").symlink_to(folder)  # 2**40 paths, if they were followed
    assert texts(f"{folder}/*.txt") == ["one"]
    assert texts(f"{folder}/**/*.txt") == ["one", "two"]
    assert texts(f"{folder}/**") == ["one", "two"]
    assert texts(f"{folder}/.*.txt") == ["hidden"]
    monkeypatch.chdir(folder)
    assert texts("./**/*.txt") == ["one", "two"]
    assert texts("[ab].txt") == ["one"]


def test_paths_that_hold_nothing_to_read_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for path, found in (
        ("nothing-*.txt", "no such file"),
        ("a**b", "no such file"),
        ("x" * 300, "no such file"),
        (tmp_path / "empty", "nothing to read"),
        (tmp_path / "fifo", "nothing to read"),
        ("/dev/zero", "nothing to read"),
    ):
        with pytest.raises(UserError, match=found):
            expand([str(path)])
