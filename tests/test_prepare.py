"""pytest tests/test_prepare.py"""

import gzip
import itertools
import json
import os
import resource
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import zstandard

import data
from config import read_json
from conftest import run
from data import TokenFile, TokenWriter, load_npy
from test_data import write
from prepare import LONGEST, Dedup, Tokenize, chunks, dedup, input_files, read_all, tokenize

WORDS = ["the", " king", " spoke", "\n\n", "  of", " 世界", " é", "é", " 1234",
         " <|endoftext|>", " \x00", "'s"]


def line(text, subset="A", key="meta"):
    return json.dumps({"text": text, key: {"pile_set_name": subset}}) + "\n"


@pytest.fixture(scope="module")
def texts():
    rng = np.random.RandomState(0)
    return ["".join(rng.choice(WORDS, rng.randint(0, 60))) for _ in range(3000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """The same texts as plain, gzipped and zstandard JSON lines and one .txt file each."""
    folder = tmp_path_factory.mktemp("text")
    lines = [line(text, f"set {i % 3}", "metadata" if i % 2 else "meta")
             for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(lines[:1000]) + "\n\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[1000:2000]).encode()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[2000:2999]).encode()))
    (folder / "d.txt").write_text(texts[2999])
    (folder / "e.jsonl").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def tokenized(folder, tokenizer_path):
    run("prepare.py", "tokenize", f"--input={folder}", f"--output={folder}/out")
    return folder / "out"


def test_every_form_of_input_gives_the_original_tokenizers_ids(tokenized, texts, tokenizer_path):
    original = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    tokens, ids = TokenFile(tokenized), [original.encode(text).ids for text in texts]
    assert [tokens.read(i).tolist() for i in range(len(tokens))] == [i + [0] for i in ids if i]


def assert_same_files(first, second):
    for suffix in (".bin", ".idx", "_documents.npy"):
        with open(f"{first}{suffix}", "rb") as one, open(f"{second}{suffix}", "rb") as other:
            assert one.read() == other.read()


def test_the_same_bytes_for_one_and_many_workers(folder, tokenized, tmp_path):
    for workers in (1, 2):
        run("prepare.py", "tokenize", f"--input={folder}", f"--output={tmp_path}/{workers}",
            f"--workers={workers}")
        assert_same_files(tmp_path / str(workers), tokenized)
        assert read_json(tmp_path / f"{workers}.json") == read_json(f"{tokenized}.json")


def test_subset_file_and_line_are_kept(folder, tokenized, texts):
    names, table = read_json(f"{tokenized}.json"), load_npy(f"{tokenized}_documents.npy")
    where = [(("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")[i // 1000], i % 1000 + 1, f"set {i % 3}")
             for i in range(2999)] + [("d.txt", 1, "unnamed")]
    expected = [(str(folder / file), number, subset)
                for (file, number, subset), text in zip(where, texts) if text]
    assert [(names["files"][row["file"]], row["line"], names["subsets"][row["subset"]])
            for row in table] == expected
    assert names["empty_documents"] == texts.count("") and names["documents"] == len(expected)


def test_a_killed_job_goes_on_to_the_same_bytes(folder, tmp_path, tokenizer_path, monkeypatch):
    content = gzip.decompress((folder / "b.jsonl.gz").read_bytes()) * 10
    (tmp_path / "big.jsonl.gz").write_bytes(gzip.compress(content))
    flags = ["prepare.py", "tokenize", f"--input={tmp_path}/big.jsonl.gz"]
    run(*flags, f"--output={tmp_path}/whole", "--workers=1")
    ticks = iter(range(0, 10**6, 9))  # so that every chunk is committed
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: next(ticks)))

    def commit(self, commit=TokenWriter.commit):
        commit(self)
        if self.position:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(TokenWriter, "commit", commit)
    if not (child := os.fork()):
        try:
            tokenize(Tokenize(f"{tmp_path}/big.jsonl.gz", f"{tmp_path}/cut", workers=1,
                              tokenizer=str(tokenizer_path)))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    at = read_json(tmp_path / "cut.partial/progress.json")["position"][0]
    assert at[1] > 0 and not (tmp_path / "cut.idx").exists()
    run(*flags, f"--output={tmp_path}/cut")
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


def test_reading_goes_on_from_any_position_of_any_form(folder):
    paths = input_files(f"{folder}/*.jsonl*,{folder}/d.txt")
    whole = list(read_all(paths))
    assert len(whole) == 3002 and [*itertools.chain(*chunks(whole, 999))] == whole
    for i in [*range(0, len(whole), 9), 1001, len(whole) - 1]:  # line 1001 is the last of its file
        file, _, number, _ = whole[i]
        assert list(read_all(paths, (file, number))) == whole[i + 1:]


def test_bad_lines_stop_or_are_counted(tmp_path, tokenizer_path, command, refused):
    good, long = line("Hello world").encode(), line("word " * 1_000_000).encode()
    bad = [b'{"text": 3}', b'{"text": "\xff"}', b'{"text": "a\\ud800b"}', b'{"text": ']
    flags = ["prepare.py", "tokenize", f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/out",
             "--workers=1"]
    for text in bad:
        (tmp_path / "a.jsonl").write_bytes(good + b"\n" + text)
        assert "a.jsonl, line 3: expected UTF-8, and in .jsonl" in refused(*flags)
    (tmp_path / "a.jsonl").write_bytes(good + b"\n".join(bad) + b"\n" + long)
    said = command(*flags, "--skip_malformed=True", "--append_eod=False").stdout
    assert "2 documents" in said and "4 malformed lines" in said
    tokens = TokenFile(tmp_path / "out")
    assert tokens.read(0).tolist() == [12092, 1533]
    assert tokens.sizes[1] == 1_000_001  # word, 999,999 times " word", " "


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(line("x" * 9999).encode())[:-9], "Compressed file ended before"),
    ("a.jsonl.zst", zstandard.compress(line("x" * 9999).encode())[:-9], "cut off"),
    ("a.jsonl.gz", 20 * gzip.compress(bytes(1 << 24)), "a document of over 64 MiB"),
    ("a.jsonl.zst", zstandard.compress(bytes(320 << 20)), "a document of over 64 MiB"),
    ("a.txt", bytes(LONGEST + 1), "a document of over 64 MiB")], ids=range(6))
def test_damage_and_bombs_are_named_in_bounded_memory(
        tmp_path, tokenizer_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    done = run("prepare.py", "tokenize", f"--input={tmp_path / name}", f"--output={tmp_path}/out",
               expect=2, preexec_fn=lambda: resource.setrlimit(
                   resource.RLIMIT_DATA, (600 << 20, 600 << 20)))
    assert f"{tmp_path / name}: cannot be read from line 1 on: {words}" in done.stderr
    assert not (tmp_path / "out.idx").exists()


def test_each_real_file_comes_once(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.txt", "in/c.jsonl"):
        (tmp_path / name).touch()
    for i in range(3):  # circles: a glob that followed them would find 3^40 paths
        (tmp_path / "in" / f"up{i}").symlink_to(tmp_path)
    three = [f"{tmp_path}/{name}" for name in ("a.txt", "b.jsonl", "in/c.jsonl")]
    for spec in (str(tmp_path), f"{tmp_path}/*.*,{tmp_path}/**/*.jsonl,{tmp_path}/in/../b.jsonl"):
        assert input_files(spec) == three
    os.mkfifo(tmp_path / "in/pipe.jsonl")
    with pytest.raises(ValueError, match="pipe.jsonl: not a regular file"):
        input_files(str(tmp_path))


@pytest.mark.parametrize("strangers", [
    ["out.partial/notes.txt"], ["out.partial/bin"], ["out.json"], ["out.bin", "out.idx"],
    ["out.partial/progress.json", "out.partial/sizes"]])
def test_what_is_not_ours_is_kept(tmp_path, tokenizer_path, strangers):
    (tmp_path / "a.jsonl").write_text(line("one"))
    for name in strangers:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("sizes"):
            (tmp_path / name).symlink_to(tmp_path / "a.jsonl")
        else:
            (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="/out.*name another output"):
        tokenize(Tokenize(f"{tmp_path}/a.jsonl", f"{tmp_path}/out", str(tokenizer_path)))
    for name in ("./a.jsonl", "new.bin", *strangers):
        with pytest.raises(ValueError, match="output = .*expected a .jsonl"):
            dedup(Dedup(f"{tmp_path}/a.jsonl", f"{tmp_path}/{name}", threshold=1.0))
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() in ("{}", line("one")) for path in before if path.is_file())


def test_a_command_that_was_killed_as_it_began_goes_on(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_text(line("one"))
    (tmp_path / "out.partial").mkdir()
    for name in ("progress.lock", "bin"):
        (tmp_path / "out.partial" / name).touch()
    tokenize(Tokenize(f"{tmp_path}/a.jsonl", f"{tmp_path}/out", str(tokenizer_path)))
    assert len(TokenFile(tmp_path / "out").read(0)) == 2


def test_a_killed_shuffle_goes_on(tmp_path):
    sizes = np.random.RandomState(0).randint(1, 99, 500)
    write(tmp_path / "d", np.split(np.arange(sizes.sum()) % 50000, np.cumsum(sizes)[:-1]))
    flags = ["prepare.py", "shuffle", f"--data={tmp_path}/d", "--seq_length=8", "--steps=500",
             "--batch_size=4"]
    run(*flags, f"--output={tmp_path}/whole")
    baked = (tmp_path / "whole.bin").read_bytes()
    job = read_json(tmp_path / "whole.json")["baked_from"]
    writer = TokenWriter(tmp_path / "cut", job)  # what a job killed after 300 rows leaves
    writer.append(np.frombuffer(baked, "<u2")[:300 * 9], np.full(300, 9), position=300)
    writer.commit()
    writer.close()
    run(*flags, f"--output={tmp_path}/cut")
    assert (tmp_path / "cut.bin").read_bytes() == baked


def test_equal_and_near_duplicates_are_removed(tmp_path):
    rng = np.random.RandomState(1)
    bases = [[f"w{rng.randint(5000)}" for _ in range(400)] for _ in range(30)]
    documents = [(words, None) for words in bases]
    for i in range(10):
        near, far = list(bases[i]), list(bases[i])
        near[7] = "changed"  # 5 of 396 n-grams differ
        far[::25] = ["changed"] * len(far[::25])  # of n-grams, a Jaccard of 0.66
        documents += [(bases[i], i), (near, i), (near, i), (far, None)]
    (tmp_path / "a.jsonl").write_text("".join(line(" ".join(words)) for words, _ in documents))
    run("prepare.py", "dedup", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/near.jsonl")
    kept = [json.loads(row)["text"].split() for row in (tmp_path / "near.jsonl").open()]
    assert kept == [words for words, duplicate_of in documents if duplicate_of is None]
    removed = (tmp_path / "near.jsonl.removed.csv").read_text().splitlines()[1:]
    assert len(removed) == 30 and all(
        row.split(",")[2] == "near" for row in removed[1::3] + removed[2::3])
    assert removed[0] == f"{tmp_path}/a.jsonl:31,{tmp_path}/a.jsonl:1,equal,1.000"
    done = run("prepare.py", "dedup", f"--input={tmp_path}/a.jsonl",
               f"--output={tmp_path}/equal.jsonl", "--threshold=1")
    assert "50 documents stay; removed 20 equal and 0 nearly equal ones" in done.stdout
