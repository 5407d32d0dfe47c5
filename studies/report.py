"""One page of what the miniature of studies/suite.py found, beside what the paper found.

    python -m studies.report --suite=runs/suite
"""

import base64
import html
import sys
from dataclasses import dataclass
from pathlib import Path

from config import parse, replacing, run
from data import TokenFile, read_json
from plots import read_csv
from studies.corpus import PROSE
from studies.figures import count, natural

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h3 { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; }
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
    """Return an HTML table; numbers short."""
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
    whole = f'<div class="table"><table>{body}</table></div>'
    return whole if len(rows) <= 8 else (
        f"<details><summary>{len(rows)} rows of numbers</summary>{whole}</details>")


def columns(path, names, keep=lambda row: True):
    """Return a table of some columns of a CSV's rows."""
    rows = [[row[name] for name in names] for row in read_csv(path) if keep(row)]
    return table(names, sorted(rows, key=lambda row: natural(row[0])))


def image(path, alt):
    if not path.exists():
        return ""
    png = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{png}"></p>'


def beside(paper, ours):
    return (f'<div class="two"><div><p><b>The paper.</b> {paper}</p></div>'
            f"<div><p><b>Here.</b> {ours}</p></div></div>")


def interval(row):
    """Say a difference with its interval, and whether it can be told from nothing."""
    low, high = float(row["low"]), float(row["high"])
    verdict = ("different from zero" if low > 0 or high < 0 else
               "not to be told from zero at this scale")
    return f"{float(row['difference']):+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"


def with_error(row):
    """Say a mean matched length, its standard error over passages, and what it is of."""
    error = f" ± {float(row['stderr']):.2f}" if row["stderr"] else ""
    return (f"{float(row['mean_length']):.2f}{error} ({row['subset']}: {count(row['n'], 'row')}, "
            f"{count(row['passages'], 'passage')})")


def training(out, steps):
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
        if (verify := folder.parent / "verify.csv").exists():
            # `verify` ends with an error if there is a problem, and then the suite stops.
            checked.append(f"{name} {len({row['step'] for row in read_csv(verify)})}")
    return table(("run", "parameters", "+ embeddings", "tokens", "passes over its corpus",
                  "bits/byte at 0", "at the end"), rows) + (
        "<p>No problem was found by <code>checkpoints.py verify</code> (hashes, duplicates, weights "
        f"that belong to another step) in the checkpoints of: {', '.join(checked)}.</p>")


def memorization(out, steps):
    parts = []
    last = lambda row: row["step"] == str(steps)
    for corpus in ("standard", "deduped", "control"):
        folder = out / f"memorization_{corpus}"
        parts += [f"<h3>{corpus}</h3>",
                  image(out / f"memorization_{corpus}.png", f"memorization, {corpus}"),
                  columns(folder / "rates.csv", (
                      "model", "subset", "rows", "n", "passages", "memorized", "rate", "mean_length",
                      "stderr"), last)]
        if corpus != "control":
            parts += [columns(folder / "poisson.csv", (
                          "model", "window", "n", "mean", "binomial", "test", "statistic", "p"), last),
                      columns(folder / "position.csv", (
                          "model", "subset", "n", "slope", "stderr", "p"), last),
                      columns(folder / "early.csv", (
                          "model", "step", "memorized", "memorized_last", "both", "precision",
                          "recall"))]
    return beside(
        "Memorized rows in windows of 512 rows fit a Poisson distribution, so when a row was seen does "
        "not matter for whether it is memorized (k = l = 32).",
        f"Eight right tokens in a row count as memorized, in windows of 64 rows. "
        f"{what_is_memorized(out, steps)} {is_it_poisson(out, steps)}") + "".join(parts)


def what_is_memorized(out, steps):
    """Say matched lengths by subset, the declared repeats' share, the deduplicated run, the control."""
    rates = {corpus: [row for row in read_csv(out / f"memorization_{corpus}" / "rates.csv")
                      if row["step"] == str(steps) and row["rows"] != "after this checkpoint"]
             for corpus in ("standard", "deduped", "control")}
    said = []
    for model in sorted({row["model"] for row in rates["standard"]}, key=natural):
        mine = {row["subset"]: row for row in rates["standard"] if row["model"] == model}
        repeats = [row for name, row in mine.items() if name.startswith("repeated")]
        in_repeats, total = sum(int(row["memorized"]) for row in repeats), mine["all"]["memorized"]
        shown = [*sorted(repeats, key=lambda row: natural(row["subset"]), reverse=True), mine[PROSE]]
        twin = model.replace("standard", "deduped")
        deduped = [float(row["mean_length"]) for row in rates["deduped"]
                   if row["model"] == twin and row["subset"] != "all"]
        control = next(row for row in rates["control"]
                       if (row["model"], row["subset"]) == (model, "all"))
        said.append(
            f"{model}: {', '.join(map(with_error, shown))}; never trained on: {with_error(control)}; "
            f"{twin}: {min(deduped):.2f} to {max(deduped):.2f} in every subset. Of its {total} "
            f"memorized rows {in_repeats} lie within declared repeats.")
    return ("Tokens right of 32, with the standard error over passages (the copies of one are not "
            f"independent; one passage has none): {' '.join(said)}")


def is_it_poisson(out, steps):
    """Say dispersion beside the binomial's, and what is known of position."""
    read = lambda name: [row for row in read_csv(out / "memorization_standard" / name)
                         if row["step"] == str(steps)]
    counts = "; ".join(
        f"{row['model']}: {float(row['mean']):.1f} a window, dispersion {float(row['statistic']):.2f}, "
        f"binomial {float(row['binomial']):.2f}, Poisson 1 (p = {float(row['p']):.2g})"
        for row in sorted(read("poisson.csv"), key=lambda row: natural(row["model"]))
        if row["window"] == "64" and row["test"] == "dispersion" and row["p"])
    places = "; ".join(
        f"{row['model']}: {float(row['slope']):+.2f} ± {float(row['stderr']):.2f} tokens "
        f"(p = {float(row['p']):.2g}, {row['n']} rows)"
        for row in sorted(read("position.csv"), key=lambda row: natural(row["model"]))
        if row["subset"] == PROSE and row["p"])
    return (
        f"Counts: {counts or 'nothing was memorized'}. Dispersion is the counts' variance over their "
        "mean. Repeats are spread over the windows by the shuffle, so these counts show the shuffle of "
        "the repeats, and not when a row was learnt: position cannot be tested on repeated passages. "
        f"On prose that comes once, from the first row of training to the last: "
        f"{places or 'no token was right'}.")


def gender(out):
    parts, final = [], {}
    for folder in sorted(out.glob("gender_pronouns_*/gender_bias.csv")):
        folder = folder.parent
        name, rows = folder.name.removeprefix("gender_"), read_csv(folder / "gender_bias.csv")
        last, seeds = max(int(row["step"]) for row in rows), count(rows[0]["seeds"], "seed")
        final[name] = f"{name}, {seeds}: " + "; ".join(
            f"{row['measure']} {interval(row)} (n = {row['items']} items)"
            for row in rows if int(row["step"]) == last)
        parts += [f"<h3>{name} ({seeds})</h3>", image(out / f"{folder.name}.png", name),
                  columns(folder / "gender_bias.csv", (
                      "measure", "step", "seeds", "items", "twin", "branch", "difference", "low",
                      "high"))]
    return beside(
        "With masculine pronouns made feminine in the last 7 % or 21 % of training, bias on WinoBias "
        "and CrowS-Pairs falls, most in the largest models, and LAMBADA hardly suffers.",
        "In the last quarter, against twins of the same checkpoints; intervals over items and seeds, "
        "of one seed over items only. heldout is log p(she) - log p(he), cost the held-out text's bits "
        f"per byte, which grow if the intervention cost something. {'. '.join(final.values())}. "
        "pronouns_as_pushed is the code as it was pushed to gpt-neox.") + "".join(parts)


def terms(out):
    gaps, bins = read_csv(out / "terms_gaps.csv"), read_csv(out / "terms_bins.csv")
    experiment = {row["terms"]: row for row in read_csv(out / "terms_compare.csv")}
    last, said = max(int(row["step"]) for row in gaps), []
    for gap in (row for row in gaps if int(row["step"]) == last):
        mine = [row for row in bins if row["bins"] == "quantile"
                and (row["model"], row["step"]) == (gap["model"], gap["step"])]
        right = sum(int(row["n"]) * float(row["acc"]) for row in mine) / int(gap["n"])
        said.append(f"{gap['model']}: {right:.1%} of the sums right; log-probability of the right "
                    "answer, most minus least frequent tenth of the operands: " + interval({
                        "difference": gap["logprob_gap"], "low": gap["logprob_low"],
                        "high": gap["logprob_high"]}))
    difference = experiment["chosen minus others"]
    return beside(
        "The correlation of arithmetic with operands' frequency shows from 2.8B parameters on, and the "
        "gap between frequent and rare operands grows with training.",
        "Sums whose first operands have frequencies that do not depend on their size. "
        f"{'. '.join(said)}. The experiment: rows with the sums of {experiment['chosen']['n']} rare "
        "operands come three more times in the second half; what that changed for their sums, less "
        f"what it changed for others: {interval(difference)} "
        f"({count(difference['seeds'], 'seed')}).") + "".join([
            image(out / "terms.png", "term frequency"),
            table(gaps[0], [list(row.values()) for row in gaps]),
            "<h3>branch against twin, log-probability of the right answer</h3>",
            columns(out / "terms_compare.csv", (
                "terms", "step", "seeds", "n", "difference", "low", "high"))])


def main(options):
    out = Path(options.suite)
    done = read_json(out / "done.json")
    steps = max(int(folder.name[4:]) for folder in out.glob("standard_d*/step*"))
    sections = {
        "Training": lambda: image(out / "curves.png", "held-out bits per byte over tokens")
        + training(out, steps), "Memorization": lambda: memorization(out, steps),
        "Gendered pronouns": lambda: gender(out), "Term frequency": lambda: terms(out)}
    page = ["<!doctype html><html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width'>",
            f"<title>Pythia in miniature</title><style>{STYLE}</style><h1>Pythia in miniature</h1>",
            "<p>Three sizes, a standard and a deduplicated corpus, one order, checkpoints spaced by "
            "powers of two, and the paper's three studies with control twins: "
            f"{len(done)} commands, {sum(done.values()) / 60:.0f} minutes on this machine. Nothing was "
            "tuned to look like the paper, and much of it is too small to say what the paper says.</p>"]
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
