"""One page of what the miniature of studies/suite.py found, beside what the paper found.

    python -m studies.report --suite=runs/suite
"""

import base64
import html
import sys
from dataclasses import dataclass
from pathlib import Path

from checkpoints import step_folders
from config import parse, read_json, replacing, run
from data import TokenFile
from plots import count, natural, read_csv
from studies.corpus import PROSE

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h3 { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.table, pre { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .2rem .5rem; text-align: right; }
th { vertical-align: bottom; }
th, td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
.two > div { border: 1px solid var(--line); border-radius: 6px; padding: .2rem .9rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Report:
    suite: str = "runs/suite"  # folder of studies/suite.py


def table(header, rows):
    """Return an HTML table, numbers short."""
    def cell(value):
        try:
            number = float(value)
            whole = number == int(number) and abs(number) >= 1
            return f"{number:,.0f}" if whole else f"{number:.4g}"
        except (ValueError, OverflowError):
            return html.escape(str(value))
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    lines += ["".join(f"<td>{cell(value)}</td>" for value in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table>{body}</table></div>'


def image(path, alt):
    if not path.exists():
        return ""
    png = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{png}"></p>'


def beside(paper, ours):
    return (f'<div class="two"><div><p><b>The paper.</b> {paper}</p></div>'
            f"<div><p><b>Here.</b> {ours}</p></div></div>")


def interval(value, low, high, over=""):
    """Say a difference with its interval, and whether that tells it from zero; "-" if not there."""
    if not low:
        return "-"
    value, low, high = float(value), float(low), float(high)
    verdict = ("of one seed: another run may differ as much" if "one pair" in over else
               "different from zero" if low > 0 or high < 0 else
               "not to be told from zero at this scale")
    return f"{value:+.3g} [{low:+.3g}, {high:+.3g}], {verdict}"


def training(out, steps, done):
    rows, checked = [], []
    for folder in sorted(out.glob("*/config.json"), key=lambda path: natural(path.parent.name)):
        settings, name = read_json(folder), folder.parent.name
        V, D, L = settings["vocab_size"], settings["d_model"], settings["n_layers"]
        found = {row["step"]: float(row["value"]) for row in read_csv(out / "results.csv")
                 if (row["model"], row["task"]) == (name, "heldout")
                 and row["metric"] == "bits_per_byte"}
        if found:
            tokens = steps * settings["batch_size"] * settings["seq_length"]
            passes = tokens / TokenFile(settings["data"]).n_tokens
            rows.append((name, L * (12 * D * D + 13 * D) + 2 * D, 2 * V * D, tokens,
                         f"{passes:.2f}", found["0"], found[str(steps)]))
        # done.json has the commands that ended well: `verify` does not if there is a problem.
        if any("verify.py verify " in line and line.endswith(f"/{name}") for line in done):
            checked.append(f"{name} {len(step_folders(folder.parent))}")
    return table(("run", "parameters", "+ embeddings", "tokens", "passes over its corpus",
                  "bits/byte at 0", "at the end"), rows) + (
        "<p>No problem was found by <code>verify.py verify</code> (hashes, duplicates, "
        f"weights that belong to another step) in the checkpoints of: {', '.join(checked)}.</p>")


def memorization(out, steps):
    return beside(
        "Memorized rows in windows of 512 rows fit a Poisson distribution, so when a row was seen "
        "does not matter for whether it is memorized (k = l = 32).",
        "The same k and l, in windows of 64 rows. Repeats are spread over the windows by the "
        "shuffle, so such counts show the shuffle, and not when a row was learnt.") + "".join([
            image(out / "memorization_standard.png", "memorization"),
            "<h3>Tokens right of 32, by text</h3><p>With a 95 % interval over passages (one has "
            "none) and the number of rows.</p>", what_is_memorized(out, steps),
            "<h3>Counts per window</h3><p>Dispersion is the counts' variance over their mean, 1 "
            "for a Poisson process. Its p against one (of use while the share is under 4 %), and "
            "that against the same rows in any other order.</p>", is_it_poisson(out, steps)])


def what_is_memorized(out, steps):
    """Return a table of matched lengths by text."""
    rates = {}  # (run, text): row
    for corpus in ("standard", "deduped", "control"):
        for row in read_csv(out / f"memorization_{corpus}" / "rates.csv"):
            if row["step"] == str(steps) and row["rows"] != "after this checkpoint":
                text = row["subset"] if corpus != "control" else "never trained on"
                rates.setdefault((row["model"], text), row)  # of the control its first, all
    runs = sorted({name for name, _ in rates},
                  key=lambda name: (name.startswith("deduped"), natural(name)))
    texts = sorted({text for _, text in rates}, key=natural)

    def cell(row):
        ends = f" [{float(row['low']):.1f}, {float(row['high']):.1f}]" if row["low"] else ""
        return f"{float(row['mean_length']):.2f}{ends} ({int(row['n']):,})"

    return table(("text", *runs), [
        (text, *(cell(rates[name, text]) if (name, text) in rates else "" for name in runs))
        for text in texts])


def is_it_poisson(out, steps):
    """Return a table of the standard runs' dispersion and trend."""
    names = ("model", "window", "n", "mean", "share", "test", "statistic", "p", "permutation_p")
    rows = [[row[name] for name in names]
            for row in read_csv(out / "memorization_standard" / "poisson.csv")
            if row["step"] == str(steps)]
    return table(names, sorted(rows, key=lambda row: natural(row[0])))


def gender(out):
    parts, final = [], []
    for folder in sorted(path.parent for path in out.glob("gender_pronouns_*/gender_bias.csv")):
        name, rows = folder.name.removeprefix("gender_"), read_csv(folder / "gender_bias.csv")
        last = max(int(row["step"]) for row in rows)
        final += [(name, row["measure"],
                   interval(row["difference"], row["low"], row["high"], row["over"]), row["p"],
                   row["items"], row["documents"], row["seeds"])
                  for row in rows if int(row["step"]) == last]
        parts += [f"<h3>{html.escape(name)} ({count(rows[0]['seeds'], 'seed')})</h3>",
                  image(out / f"{folder.name}.png", name)]
    return beside(
        "With masculine pronouns made feminine in the last 7 % or 21 % of training, bias on "
        "WinoBias and CrowS-Pairs falls, most in the largest models, and LAMBADA hardly suffers.",
        "In the last quarter, against twins of the same checkpoints; pronouns_as_pushed is the "
        "code as it was pushed to gpt-neox. A model that says “she” more often everywhere is "
        "no less biased: that is the shift. Heldout context is how much more a place of “she” "
        "makes of it than one of “he”: where it falls, context matters less.") + "".join([
            "<h3>Branch minus twin at the end</h3><p>cost is the held-out text's bits per byte, "
            "which grow if the intervention cost something. All p but that of heldout context "
            "are adjusted for their number.</p>",
            table(("intervention", "measure", "difference", "p", "items", "documents", "seeds"),
                  final), *parts])


def terms(out):
    gaps, bins = read_csv(out / "terms_gaps.csv"), read_csv(out / "terms_bins.csv")
    experiment = {row["terms"]: row for row in read_csv(out / "terms_compare.csv")}
    last, lines = max(int(row["step"]) for row in gaps), []
    for gap in (row for row in gaps if int(row["step"]) == last):
        mine = [row for row in bins if row["bins"] == "quantile"
                and (row["model"], row["step"]) == (gap["model"], gap["step"])]
        right = sum(int(row["n"]) * float(row["acc"]) for row in mine) / int(gap["n"])
        lines.append((gap["model"], f"{right:.1%}", *(
            interval(gap[name], gap[low], gap[high]) for name, low, high in (
                ("slope", "slope_low", "slope_high"),
                ("logprob_gap", "logprob_low", "logprob_high")))))
    found = experiment["chosen minus others"]
    return beside(
        "The correlation of arithmetic with operands' frequency shows from 2.8B parameters on, and "
        "the gap between frequent and rare operands grows with training.",
        "Sums whose operands have frequencies that do not depend on their size. The experiment: "
        f"sums of {experiment['chosen']['n']} rare operands come more often in the second half. "
        "What that changed for their sums, less what it changed for others: "
        + interval(found["difference"], found["low"], found["high"], found["over"])
        + f" ({count(found['seeds'], 'seed')}).") + "".join([
            "<h3>Log-probability of the right answer at the end, over the terms of one run</h3>",
            table(("run", "sums right", "nats per doubling of the count",
                   "most minus least frequent tenth"), lines),
            image(out / "terms.png", "term frequency")])


def main(options):
    out = Path(options.suite)
    done = read_json(out / "done.json")
    steps = max(int(folder.name[4:]) for folder in out.glob("standard_d*/step*"))
    sections = {
        "Training": lambda: image(out / "curves.png", "held-out bits per byte over tokens")
        + training(out, steps, done), "Memorization": lambda: memorization(out, steps),
        "Gendered pronouns": lambda: gender(out), "Term frequency": lambda: terms(out)}
    page = ["<!doctype html><html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width'>",
            f"<title>Pythia in miniature</title><style>{STYLE}</style><h1>Pythia in miniature</h1>",
            "<p>Three sizes, a standard and a deduplicated corpus, one order, checkpoints spaced "
            "by powers of two, and the paper's three studies with control twins: "
            f"{len(done)} commands, {sum(done.values()) / 60:.0f} minutes on this machine. Nothing "
            "was tuned to look like the paper, and much of it is too small to say what the paper "
            "says. All numbers are in the CSV files beside this page.</p>"]
    for title, section in sections.items():
        try:
            page.append(f"<h2>{title}</h2>" + section())
        except (OSError, KeyError, ValueError, StopIteration) as error:
            raise ValueError(f"{out}: the section {title} cannot be written: {error}; "
                             "run `python -m studies.suite` on") from None
    commands = "\n".join(f"{seconds:7.1f} s  python {line}" for line, seconds in done.items())
    page.append(f"<h2>Commands</h2><pre>{html.escape(commands)}</pre></html>")
    with replacing(out / "report.html") as file:
        file.write("\n".join(page).encode())
    print(out / "report.html")


if __name__ == "__main__":
    run(main, parse(sys.argv[1:], Report))
