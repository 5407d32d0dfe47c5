"""One self-contained page of what the miniature of studies/suite.py found, beside what the paper found.

    python -m studies.report --suite=runs/suite
"""

import base64
import csv
import html
import sys
from dataclasses import dataclass
from pathlib import Path

from config import parse, replacing, run
from data import read_json
from plots import natural

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
.two > div { border: 1px solid var(--line); border-radius: 6px; padding: .2rem .9rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Report:
    suite: str = "runs/suite"  # folder of studies/suite.py


def read_csv(path):
    """Return the rows of a CSV as dicts; a study that found nothing wrote none."""
    with open(path, newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


def table(header, rows):
    """Return an HTML table; numbers short."""
    def cell(value):
        try:
            number = float(value)
            return f"{number:,.0f}" if number == int(number) and abs(number) >= 1 else f"{number:.4g}"
        except (ValueError, OverflowError):
            return html.escape(str(value))
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    lines += ["".join(f"<td>{cell(value)}</td>" for value in row) for row in rows]
    whole = '<div class="table"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
    return whole if len(rows) <= 8 else f"<details><summary>{len(rows)} rows of numbers</summary>{whole}</details>"


def columns(path, names, keep=lambda row: True):
    """Return a table of some columns of a CSV's rows."""
    rows = [[row[name] for name in names] for row in read_csv(path) if keep(row)]
    return table(names, sorted(rows, key=lambda row: natural(row[0])))


def image(path, alt):
    if not path.exists():
        return ""
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></p>'


def beside(paper, ours):
    return f'<div class="two"><div><p><b>The paper.</b> {paper}</p></div><div><p><b>Here.</b> {ours}</p></div></div>'


def interval(row):
    """Say a difference with its interval, and whether it can be told from nothing."""
    low, high = float(row["low"]), float(row["high"])
    verdict = "different from zero" if low > 0 or high < 0 else "not to be told from zero at this scale"
    return f"{float(row['difference']):+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"


def training(out, steps):
    rows = []
    for folder in sorted(out.glob("*/config.json"), key=lambda path: natural(path.parent.name)):
        settings, name = read_json(folder), folder.parent.name
        V, D, L = settings["vocab_size"], settings["d_model"], settings["n_layers"]
        found = {row["step"]: float(row["value"]) for row in read_csv(out / "results.csv")
                 if (row["model"], row["task"], row["metric"]) == (name, "heldout", "bits_per_byte")}
        if found:
            rows.append((name, L * (12 * D * D + 13 * D) + 2 * D, 2 * V * D, steps * settings["batch_size"]
                         * settings["seq_length"], found["0"], found[str(steps)]))
    return table(("run", "parameters", "+ embeddings", "tokens", "bits/byte at 0", "at the end"), rows)


def memorization(out, steps):
    parts = []
    for corpus in ("standard", "deduped"):
        folder = out / f"memorization_{corpus}"
        parts += [f"<h3>{corpus}</h3>", image(out / f"memorization_{corpus}.png", f"memorization, {corpus}"),
                  columns(folder / "rates.csv", ("model", "subset", "rows", "n", "memorized", "rate", "mean_length", "stderr"),
                          lambda row: row["step"] == str(steps)),
                  columns(folder / "poisson.csv", ("model", "window", "n", "mean", "test", "statistic", "p"),
                          lambda row: row["step"] == str(steps))]
    tests = {(row["model"], row["test"]): row for row in read_csv(out / "memorization_standard" / "poisson.csv")
             if row["step"] == str(steps) and row["window"] == "64"}
    said = "; ".join(f"{model}: rate {float(row['mean']):.1f} a window, dispersion {float(row['statistic']):.2f} (p = "
                     f"{float(row['p']):.2g}), trend p = {float(tests[model, 'trend']['p']):.2g}"
                     for (model, test), row in sorted(tests.items(), key=lambda item: natural(item[0][0]))
                     if test == "dispersion")
    return "".join([beside(
        "Memorized rows in windows of 512 rows fit a Poisson distribution, so when a row was seen does not matter "
        "for whether it is memorized (k = l = 32).",
        f"Eight right tokens in a row count as memorized, in windows of 64 rows. {said or 'Nothing was memorized'}. "
        "Dispersion is the counts' variance over their mean, 1 for a Poisson process; a small p for trend says that it "
        "matters when a row came. Where a third of the rows is memorized the counts cannot be Poisson: with that many "
        "they are bounded, and dispersion falls below 1. What is memorized are the declared repeats, the more the larger "
        "the model; their deduplicated twins are not."), *parts])


def gender(out):
    parts = []
    final = {}
    for name in ("pronouns_to_feminine", "pronouns_as_pushed"):
        path = out / f"gender_{name}" / "gender_bias.csv"
        rows = read_csv(path)
        last = max(int(row["step"]) for row in rows)
        final[name] = [f"{row['measure']} {interval(row)} (n = {row['items']} items, {row['seeds']} seeds)"
                       for row in rows if int(row["step"]) == last]
        parts += [f"<h3>{name}</h3>", image(out / f"gender_{name}.png", name),
                  columns(path, ("measure", "step", "seeds", "items", "twin", "branch", "difference", "low", "high"))]
    return "".join([beside(
        "With masculine pronouns made feminine in the last 7 % or 21 % of training, bias on WinoBias and CrowS-Pairs "
        "falls, most in the largest models, and LAMBADA hardly suffers.",
        f"In the last quarter, against twins of the same checkpoints: {'; '.join(final['pronouns_to_feminine'])}. "
        f"The code as it was pushed: {'; '.join(final['pronouns_as_pushed'])}."), *parts])


def terms(out):
    gaps = read_csv(out / "terms_gaps.csv")
    experiment = next(row for row in read_csv(out / "terms_compare.csv") if row["terms"] == "chosen minus others")
    return "".join([beside(
        "The correlation of arithmetic with operands' frequency shows from 2.8B parameters on, and the gap between "
        "frequent and rare operands grows with training.",
        "Sums from the corpus's own distribution; small models get hardly one right, so the log-probability of the "
        "right answer is what moves. The experiment: rows with rare operands come three more times in the second half; "
        f"what that changed for their sums, less what it changed for others: {interval(experiment)}."),
        image(out / "terms.png", "term frequency"), table(gaps[0], [list(row.values()) for row in gaps]),
        "<h3>branch against twin, log-probability of the right answer</h3>",
        columns(out / "terms_compare.csv", ("terms", "step", "n", "difference", "low", "high"))])


def main(options):
    out = Path(options.suite)
    done = read_json(out / "done.json")
    steps = max(int(folder.name[4:]) for folder in out.glob("standard_d*/step*"))
    sections = [("Training", lambda: image(out / "curves.png", "held-out bits per byte over tokens") + training(out, steps)),
                ("Memorization", lambda: memorization(out, steps)), ("Gendered pronouns", lambda: gender(out)),
                ("Term frequency", lambda: terms(out))]
    page = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
            f"<title>Pythia in miniature</title><style>{STYLE}</style><h1>Pythia in miniature</h1>",
            "<p>Three sizes, a standard and a deduplicated corpus, one order, checkpoints spaced by powers of two, and the "
            f"paper's three studies with control twins: {len(done)} commands, {sum(done.values()) / 60:.0f} minutes on this "
            "machine. Nothing was tuned to look like the paper, and much of it is too small to say what the paper says; "
            "where an interval holds zero, the page says so.</p>"]
    for title, section in sections:
        try:
            page.append(f"<h2>{title}</h2>" + section())
        except (OSError, KeyError, ValueError, StopIteration) as error:
            raise ValueError(f"{out}: the section {title} cannot be written: {error}; run `python -m studies.suite` on") from None
    page.append("<h2>Commands</h2><pre>" + html.escape("\n".join(f"{seconds:7.1f} s  python {line}" for line, seconds in done.items())) + "</pre></html>")
    with replacing(out / "report.html") as file:
        file.write("\n".join(page).encode())
    print(out / "report.html")


if __name__ == "__main__":
    run(main, parse(sys.argv[1:], Report))
