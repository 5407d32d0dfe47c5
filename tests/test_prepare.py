"""pytest tests/test_prepare.py"""

import gzip
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
import zstandard

from conftest import ROOT, script_of
from data import TokenFile, load_npy
from data import TokenWriter

WORDS = ["the", " king", " spoke", "\n\n", "  of", " 世界", " é", "é", " 1234",
         " <|endoftext|>", " \x00", "'s"]


def run(*argv, expect=0):
    done = subprocess.run([sys.executable, script_of(argv), *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


def line(text, subset="A", key="meta"):
    return json.dumps({"text": text, key: {"pile_set_name": subset}}) + "\n"


@pytest.fixture(scope="module")
def texts():
    rng = np.random.RandomState(0)
    return ["".join(rng.choice(WORDS, rng.randint(0, 60))) for _ in range(3000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """The same texts as plain, gzipped and zstandard JSON lines and one .txt file each, in one
    folder.
    """
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
    run("tokenize", f"--input={folder}", f"--output={folder}/out")
    return folder / "out"


def test_every_form_of_input_gives_the_original_tokenizers_ids(tokenized, texts, tokenizer_path):
    original = tokenizers.Tokenizer.from_file(str(tokenizer_path))
    tokens, ids = TokenFile(tokenized), [original.encode(text).ids for text in texts]
    assert [tokens.read(i).tolist() for i in range(len(tokens))] == [i + [0] for i in ids if i]


def test_the_same_bytes_for_one_and_many_workers(folder, tokenized, tmp_path):
    for workers in (1, 2):
        run("tokenize", f"--input={folder}", f"--output={tmp_path}/{workers}",
            f"--workers={workers}")
        for suffix in (".bin", ".idx", "_documents.npy", ".json"):
            assert ((tmp_path / f"{workers}{suffix}").read_bytes()
                    == open(f"{tokenized}{suffix}", "rb").read())


def test_subset_file_and_line_are_kept(folder, tokenized, texts):
    names, table = (json.loads(open(f"{tokenized}.json").read()),
                    load_npy(f"{tokenized}_documents.npy"))
    where = [(("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")[i // 1000], i % 1000 + 1, f"set {i % 3}")
             for i in range(2999)] + [("d.txt", 1, "unnamed")]
    expected = [(str(folder / file), number, subset)
                for (file, number, subset), text in zip(where, texts) if text]
    assert [(names["files"][row["file"]], row["line"], names["subsets"][row["subset"]])
            for row in table] == expected
    assert (names["empty_documents"] == sum(not text for text in texts)
            and names["documents"] == len(expected))


def test_without_eod(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_text(line("Hello world"))
    run("tokenize", f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/out", "--append_eod=False")
    assert TokenFile(tmp_path / "out").read(0).tolist() == [12092, 1533]


def test_a_killed_job_goes_on_to_the_same_bytes(folder, tokenized, tmp_path):
    big = tmp_path / "big.jsonl.gz"
    content = gzip.decompress((folder / "b.jsonl.gz").read_bytes()) * 10
    big.write_bytes(gzip.compress(content, 1))
    run("tokenize", f"--input={big}", f"--output={tmp_path}/whole", "--workers=1")
    command = [sys.executable, "-c",  # commits after every chunk, slowly
               "import sys, time\nimport prepare\n"
               "prepare.time.monotonic = "
               "lambda c=iter(range(0, 10**6, 9)): time.sleep(0.05) or next(c)\n"
               "import config; "
               "config.run(prepare.tokenize, config.parse(sys.argv[1:], prepare.Tokenize))",
               f"--input={big}", f"--output={tmp_path}/cut", "--workers=1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    progress = tmp_path / "cut.partial/progress.json"
    while not (progress.exists() and json.loads(progress.read_text())["position"]):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    at = json.loads(progress.read_text())["position"]["at"]
    assert 0 < at[1] < len(content) and not (tmp_path / "cut.idx").exists()
    run("tokenize", f"--input={big}", f"--output={tmp_path}/cut")
    for suffix in (".bin", ".idx", "_documents.npy"):
        assert ((tmp_path / f"cut{suffix}").read_bytes()
                == (tmp_path / f"whole{suffix}").read_bytes())


def test_bad_lines_stop_or_are_counted(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_bytes(
        line("one").encode() + b'{"text": 3}\n{"text": "\xff"}\n' + line("two").encode())
    stopped = run("tokenize", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out", expect=2)
    assert ("a.jsonl, line 2: expected an object" in stopped.stderr
            and stopped.stderr.count("\n") == 1)
    done = run("tokenize", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out",
               "--skip_malformed=True")
    assert "2 documents" in done.stdout and "2 bad lines" in done.stdout


def test_a_long_line_and_a_lone_surrogate(tmp_path, tokenizer_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "word " * 1_000_000}) + '\n{"text": "a\\ud800b"}\n')
    run("tokenize", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out")
    # word, 999,999 times " word", " ", EOD.
    assert TokenFile(tmp_path / "out").sizes[0] == 1_000_002


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: damaged or cut off"),
    # The time in gzip's header would be in the test's name, which two processes must agree on.
    ("a.jsonl.gz", gzip.compress(line("x" * 9999).encode(), mtime=0)[:-9],
     "a.jsonl.gz: damaged or cut off"),
    ("a.jsonl.zst", b"no zstd", "a.jsonl.zst: damaged or cut off"),
    ("a.jsonl.zst", zstandard.compress(line("x" * 9999).encode())[:-9],
     "a.jsonl.zst: damaged or cut off")])
def test_damaged_archives_are_named(tmp_path, tokenizer_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    done = run("tokenize", f"--input={tmp_path / name}", f"--output={tmp_path}/out", expect=2)
    assert (words in done.stderr and done.stderr.count("\n") == 1
            and not (tmp_path / "out.idx").exists())


# ---------------------------------------------------------------------------- shuffle and dedup


def test_a_killed_shuffle_goes_on(tmp_path):
    writer = TokenWriter(tmp_path / "d", "test")
    sizes = np.random.RandomState(0).randint(1, 99, 500)
    writer.append(np.arange(sizes.sum()) % 50000, sizes)
    writer.finish({})
    flags = [f"--data={tmp_path}/d", "--seq_length=8", "--steps=500", "--batch_size=4"]
    run("shuffle", *flags, f"--output={tmp_path}/whole")
    baked = (tmp_path / "whole.bin").read_bytes()
    job = json.loads((tmp_path / "whole.json").read_text())["baked_from"]
    rows = np.frombuffer(baked, "<u2")[:300 * 9].reshape(300, 9).copy()
    for spoiled in (False, True):
        rows[123] += spoiled
        writer = TokenWriter(tmp_path / "cut", job)  # what a job killed after 300 rows leaves
        writer.append(rows, np.full(300, 9))
        writer.commit(300)
        writer.close()
        done = run("shuffle", *flags, f"--output={tmp_path}/cut", expect=2 if spoiled else 0)
        assert ((tmp_path / "cut.bin").read_bytes() == baked) != spoiled
    assert "cut.bin: row 123 is not the order's" in done.stderr


def jaccard(first, second, n=5):
    sets = [{tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}
            for words in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_equal_and_near_duplicates_are_removed(tmp_path):
    rng = np.random.RandomState(1)
    bases = [[f"w{rng.randint(5000)}" for _ in range(400)] for _ in range(30)]
    documents = [(words, None) for words in bases]
    for i in range(10):
        documents.append((bases[i], i))  # equal
        near = list(bases[i])
        near[7] = "changed"
        documents.append((near, i))  # 5 of 396 n-grams differ
        documents.append((near, i))  # equal to what a near duplicate was
        far = list(bases[i])
        far[::25] = ["changed"] * len(far[::25])
        assert jaccard(far, bases[i]) < 0.75
        documents.append((far, None))
    (tmp_path / "a.jsonl").write_text("".join(line(" ".join(words)) for words, _ in documents))
    run("dedup", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/near.jsonl")
    kept = [json.loads(row)["text"].split() for row in (tmp_path / "near.jsonl").open()]
    assert kept == [words for words, duplicate_of in documents if duplicate_of is None]
    removed = (tmp_path / "near.jsonl.removed.csv").read_text().splitlines()[1:]
    assert len(removed) == 30 and all(
        row.split(",")[2] == "near" for row in removed[1::3] + removed[2::3])
    assert removed[0] == f"{tmp_path}/a.jsonl:31,{tmp_path}/a.jsonl:1,equal,1.000"
    done = run("dedup", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/equal.jsonl",
               "--threshold=1")
    assert ("50 documents stay, 20 removed (20 of them equal), 20 clusters, the largest of 2"
            in done.stdout)
