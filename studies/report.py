"""One page of what the miniature of studies/suite.py found, beside what the paper found.

    python -m studies.report --suite=runs/suite
"""

import base64
import html
import sys
from dataclasses import dataclass
from pathlib import Path

from config import parse, read_json, replacing, run
from data import TokenFile
from plots import natural, read_csv

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.table, pre { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""
OURS = {"low": "95 % from", "high": "to", "permutation_p": "p by permutation"}  # headings


@dataclass(frozen=True)
class Report:
    suite: str = "runs/suite"  # folder of studies/suite.py


def table(header, rows):
    """Return an HTML table, numbers short."""
    def cell(value):
        try:
            number = float(value)
            whole = number == int(number) and abs(number) >= 1
            return f"{number:,.0f}" if whole else f"{number:.3g}"
        except (ValueError, OverflowError):
            return html.escape(str(value))
    lines = ["".join(f"<th>{html.escape(OURS.get(name, name))}</th>" for name in header)]
    lines += ["".join(f"<td>{cell(value)}</td>" for value in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table>{body}</table></div>'


def columns(path, names, keep=lambda row: True):
    """Return a table of some columns of a CSV file's last step."""
    rows = [row for row in read_csv(path) if keep(row)]
    last = max((int(row.get("step") or 0) for row in rows), default=0)
    found = [[row[name] for name in names] for row in rows if int(row.get("step") or last) == last]
    return table(names, sorted(found, key=lambda row: natural(row[0])))


def image(path, alt):
    if not path.exists():
        return ""
    png = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{png}"></p>'


def training(out):
    rows, scores = [], read_csv(out / "results.csv")
    for name in dict.fromkeys(row["model"] for row in scores):
        settings = read_json(out / name / "config.json")
        V, D, L = settings["vocab_size"], settings["d_model"], settings["n_layers"]
        found = {int(row["step"]): float(row["value"]) for row in scores
                 if (row["model"], row["metric"]) == (name, "bits_per_byte")}
        tokens = settings["steps"] * settings["batch_size"] * settings["seq_length"]
        rows.append((name, L * (12 * D * D + 13 * D) + 2 * D, 2 * V * D, tokens,
                     tokens / TokenFile(settings["data"]).n_tokens, found[0], found[max(found)]))
    return image(out / "curves.png", "held-out bits per byte over tokens") + table(
        ("run", "parameters", "+ embeddings", "tokens", "passes over its corpus",
         "bits/byte at 0", "at the end"), rows)


def memorization(out):
    return "".join([
        "<p>The paper: memorized rows in windows of 512 rows fit a Poisson distribution, so when a "
        "row was seen does not matter for whether it is memorized (k = l = 32). Here: the same k "
        "and l in windows of 64 rows.</p>", image(out / "memorization_standard.png", "counts"),
        "<p>Dispersion is the counts' variance over their mean, 1 for a Poisson process. p is "
        "against one, which is right while the share of memorized rows is under 4 %; the other p "
        "is against the same rows in any other order. Repeats are spread by the shuffle, so such "
        "counts show the shuffle, and not when a row was learnt.</p>",
        columns(out / "memorization_standard" / "poisson.csv", (
            "model", "n", "mean", "share", "test", "statistic", "p", "permutation_p")),
        "<p>What the place of a row changes in what is learnt of it: nats a token less than those "
        "of a run with another order.</p>",
        columns(out / "position.csv", ("subset", "n", "term", "value", "stderr", "p",
                                       "permutation_p")),
        *(f"<p>Tokens right of 32: {corpus}. Intervals are over passages.</p>" + columns(
            out / f"memorization_{corpus}" / "rates.csv",
            ("subset", "model", "n", "memorized", "mean_length", "low", "high"),
            lambda row: row["rows"] != "after this checkpoint")
          for corpus in ("standard", "deduped"))])


def gender(out):
    parts = [
        "<p>The paper: with masculine pronouns made feminine in the last 7 % or 21 % of training, "
        "bias on WinoBias and CrowS-Pairs falls, most in the largest models, and LAMBADA hardly "
        "suffers. Here: the last quarter, against twins of the same checkpoints. A model that says "
        "“she” more often everywhere is no less biased: that is the shift. Context is how "
        "much more a place of “she” makes of it than one of “he”. Cost is in bits "
        "per byte. All p but that of heldout context are adjusted for their number.</p>"]
    for folder in sorted(path.parent for path in out.glob("gender_pronouns_*/gender_bias.csv")):
        parts += [f"<h3>{html.escape(folder.name.removeprefix('gender_'))}</h3>",
                  image(out / f"{folder.name}.png", folder.name),
                  columns(folder / "gender_bias.csv", (
                      "measure", "twin", "branch", "difference", "low", "high", "p", "items",
                      "documents", "seeds", "over"))]
    return "".join(parts)


def terms(out):
    return "".join([
        "<p>The paper: the correlation of arithmetic with operands' frequency shows from 2.8B "
        "parameters on, and the gap between frequent and rare operands grows with training. Here: "
        "sums whose operands have frequencies that do not depend on their size; slope is nats of "
        "the right answer per doubling of the count, over the operands of one run.</p>",
        columns(out / "terms_gaps.csv", ("model", "n", "slope", "slope_low", "slope_high", "p",
                                         "logprob_gap", "logprob_low", "logprob_high")),
        image(out / "terms.png", "term frequency"),
        "<p>The experiment: what more sums of some operands in the second half changed.</p>",
        columns(out / "terms_compare.csv", ("terms", "seeds", "n", "difference", "low", "high", "p",
                                            "over"))])


def main(options):
    out = Path(options.suite)
    done = read_json(out / "done.json")
    page = ["<!doctype html><html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width'>",
            f"<title>Pythia in miniature</title><style>{STYLE}</style><h1>Pythia in miniature</h1>",
            "<p>Three sizes, a standard and a deduplicated corpus, one order, checkpoints spaced "
            "by powers of two, and the paper's three studies with control twins: "
            f"{len(done)} commands, {sum(done.values()) / 60:.0f} minutes on this machine. Nothing "
            "was tuned to look like the paper, and much of it is too small to say what the paper "
            "says. All numbers are in the CSV files beside this page.</p>"]
    for title, section in {"Training": training, "Memorization": memorization,
                           "Gendered pronouns": gender, "Term frequency": terms}.items():
        try:
            page.append(f"<h2>{title}</h2>" + section(out))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{out}: the section {title} cannot be written: {error}; "
                             "run `python -m studies.suite` on") from None
    commands = "\n".join(f"{seconds:7.1f} s  python {line}" for line, seconds in done.items())
    page.append(f"<h2>Commands</h2><pre>{html.escape(commands)}</pre></html>")
    with replacing(out / "report.html") as file:
        file.write("\n".join(page).encode())
    print(out / "report.html")


if __name__ == "__main__":
    run(main, parse(sys.argv[1:], Report))
