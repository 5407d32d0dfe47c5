"""Draw figures from the files that training, evaluation and the studies write.

    python plots.py training --run=runs/mini --results=runs/mini/results.csv --output=mini.png
    python plots.py curves --results=results.csv --reference=pythia_v1_evals.csv --output=curves.png
    python plots.py term_frequency --bins=terms_bins.csv --output=terms.png
    python plots.py window --losses=losses.npy --output=window.html  # every token's loss, by step

--reference is the published results as one CSV with the columns model, deduped, step, shots, task,
metric, value and stderr, made from evals/pythia-v1 of EleutherAI/pythia. All but the window need
matplotlib: pip install matplotlib.
"""

import base64
import hashlib
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import command, expecting, read_csv, read_json, replacing
from data import load_npy
from eval import token_rows
from tasks import GROUPS
from tokenizer import load_tokenizer


def grid(n, columns, width, height, **options):
    """Return a figure and its n axes, each (width, height) inches."""
    import matplotlib.figure
    matplotlib.rcParams.update({
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "figure.titlesize": 11, "legend.fontsize": 8, "legend.frameon": False, "lines.linewidth": 1,
        "lines.markersize": 4})
    rows = -(-n // columns)
    figure = matplotlib.figure.Figure((width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for unused in axes.flat[n:]:
        unused.remove()
    return figure, list(axes.flat[:n])


def finish(figure, output):
    """Write the figure to a file and return it."""
    with replacing(output) as file:
        figure.savefig(file, dpi=150, format=Path(output).suffix[1:] or "png")
    print(output)
    return figure


def columns(rows, /, *names, **cells):
    """Return columns of those rows that have these cells, as arrays sorted by the first column.

    An empty cell becomes nan, which is not drawn.
    """
    chosen = [row for row in rows if all(row[name] == cell for name, cell in cells.items())]
    table = sorted([float(row[name] or "nan") for name in names] for row in chosen)
    return np.array(table).reshape(-1, len(names)).T


def shades(names):
    """Return {name: colour}, from dark to light in the order of the names (viridis up to green)."""
    from matplotlib import colormaps
    return dict(zip(names, colormaps["viridis"](np.linspace(0, 0.85, len(names)))))


def errorbars(axes, rows, column, colours, *names, **cells):
    """Draw a line with error bars for each value of `column` in colours, {value: colour}.

    names: the columns of x, y and either the standard error or an interval's low and high ends.
    cells: which rows to draw, as for `columns`.
    """
    for value, colour in colours.items():
        x, y, *error = columns(rows, *names, **cells, **{column: value})
        if len(error) == 2:
            low, high = error
            error = [(y - low, high - y)]
        axes.errorbar(x, y, *error, marker="o", color=colour, label=value)


@dataclass(frozen=True)
class Training:
    run: str  # run folder
    results: str  # CSV that eval.py --tasks=heldout wrote
    output: str = "curves.png"


def training(options):
    """Draw the training loss and the held-out bits per byte over tokens."""
    name = Path(options.run).name
    figure, (left, right) = grid(2, 2, 5, 4)
    with expecting(f"{options.run}, {options.results}", "a run and what eval.py wrote about it"):
        steps = read_csv(Path(options.run) / "metrics.csv")
        rows = [row for row in read_csv(options.results)
                if row["model"] == name and row["metric"] == "bits_per_byte"]
        if not rows:
            raise ValueError(f"no bits_per_byte of {name}; run eval.py --tasks=heldout first")
        left.plot(*columns(steps, "tokens", "loss"))
        colours = shades(sorted({row["task"] for row in rows})) | {"heldout": "black"}
        errorbars(right, rows, "task", colours, "tokens", "value", "stderr")
    right.legend(loc="lower left")
    for axes in (left, right):
        axes.set_xscale("log", nonpositive="mask")  # leaves out step 0
        axes.set(xlabel="tokens seen")
    left.set(ylabel="training loss (nats per token)")
    right.set(ylabel="held-out bits per byte")
    figure.suptitle(name)
    return finish(figure, options.output)


# ------------------------------------------------------------------ evaluation over training

# The published CSV has the names that the paper's harness gave these metrics.
METRIC_NAMES = {"ppl": "perplexity", "likelihood_difference": "likelihood_diff"}
SIZE = re.compile(r"(\d+(?:\.\d+)?)([mb])(?![a-z\d])", re.IGNORECASE)  # in pythia-1.4b-deduped


@dataclass(frozen=True)
class Curves:
    results: str  # CSV that eval.py wrote; several are separated by commas
    tasks: str | None = None  # separated by commas; default: all
    metrics: str = "acc,pct_stereotype,exact_match,em,bits_per_byte,perplexity"
    reference: str | None = None  # CSV of the published results, drawn in grey
    output: str = "curves.png"


def curves(options):
    """Draw metrics over tokens: a panel for each task, a colour for each model, error bands."""
    results = evaluations(options.results)
    panels = choose_panels(results, options.metrics, options.tasks)
    reference = evaluations(options.reference) if options.reference else {}
    columns = min(4, len(panels))
    figure, grid_axes = grid(len(panels), columns, max(3.1, 5.5 / columns), 2.6)
    figure.set_figheight(figure.get_figheight() + 0.9)  # for the legend below
    models = sorted({model for panel in panels for model in results[panel]}, key=by_size)
    families = sorted({SIZE.sub("", model) for model in models})
    styles = dict(zip(families, itertools.cycle(["-", "--", ":", "-."])))
    colours = shades(models)
    handles = dict.fromkeys(models)  # {name: one of its lines}, in the order of the legend
    for axes, panel in zip(grid_axes, panels):
        task, shots, metric = panel
        axes.set(title=f"{task}, {shots}-shot", ylabel=metric, xscale="log",
                 yscale="log" if metric.endswith("perplexity") else "linear")
        published = list(reference.get(panel, {}).items())
        for i, (model, points) in enumerate(published):
            x, y, _ = zip(*points)
            # Results of --style=v0.4 beside these are not quite comparable.
            [handles["published (v0.3)"]] = axes.plot(x, y, color="0.78", zorder=1)
            if i in (0, len(published) - 1):  # name the smallest and the largest
                axes.annotate(model.removeprefix("pythia-").removesuffix("-deduped"),
                              (x[-1], y[-1]), xytext=(3, 0), textcoords="offset points",
                              fontsize=7, color="0.5", va="center")
                axes.margins(x=0.1)
        for model, points in results[panel].items():
            (x, y, error), colour = np.array(points).T, colours[model]
            axes.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
            [handles[model]] = axes.plot(x, y, styles[SIZE.sub("", model)], color=colour,
                                         marker="o", markersize=2.2)
    for axes in grid_axes[-columns:]:  # the lowest of every column
        axes.set_xlabel("tokens seen")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", handlelength=3,
                  ncols=columns)
    return finish(figure, options.output)


def evaluations(paths):
    """Return {(task, shots, metric): {model: [(tokens, value, stderr or nan)]}} from CSV files.

    Models are sorted by size. Step 0 is left out, since tokens are drawn on a log axis. If an
    evaluation comes twice, the later row counts. Raises ValueError if a curve would mix harness
    styles, dtypes or documents.
    """
    points, made = {}, {}
    for path in paths.split(","):
        for number, row in enumerate(read_csv(path), 2):
            where = f"{path}, line {number}"
            with expecting(where, "a result of eval.py or of the published CSV"):
                model = row["model"] + "-deduped" * (row.get("deduped") == "1")
                tokens = int(row["step"]) << 21 if "deduped" in row else int(row["tokens"] or 0)
                metric = METRIC_NAMES.get(row["metric"], row["metric"])
                curve = (row["task"], int(row["shots"]), metric), model
                point = tokens, float(row["value"]), float(row["stderr"] or "nan")
            how = " ".join(row.get(name) or "published" for name in ("style", "dtype", "docs"))
            before = made.setdefault(curve, how)
            if how != before:
                raise ValueError(f"{where}: {metric} of {row['task']} by {model} in {how}, before "
                                 f"in {before}; draw them in two figures")
            if tokens > 0 and "MtokBS" not in model:  # was trained with another batch size
                points[*curve, tokens] = point
    curves = {}
    for panel, model, tokens in sorted(points, key=lambda key: (by_size(key[1]), key[2])):
        models = curves.setdefault(panel, {})
        models.setdefault(model, []).append(points[panel, model, tokens])
    return curves


def by_size(model):
    """Return a key that sorts names without a size first, "pythia-410m" before "pythia-1b"."""
    match = SIZE.search(model)
    size = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    return size, model


def choose_panels(curves, metrics, tasks):
    """Return the (task, shots, metric) to draw. Without `tasks`, a group hides its members."""
    wanted = tasks.split(",") if tasks else []
    members = {(member, shots) for task, shots, _ in curves if task in GROUPS
               for member in GROUPS[task][0]}
    panels = [(task, shots, metric) for task, shots, metric in sorted(curves)
              if metric in metrics.split(",")
              and (task in wanted if wanted else (task, shots) not in members)]
    missing = sorted(set(wanted) - {task for task, _, _ in panels})
    if missing or not panels:
        there = sorted({f"{metric} of {task}" for task, _, metric in curves})
        raise ValueError(f"the results have no {metrics} of {' or '.join(missing) or 'any task'}; "
                         f"there are {', '.join(there)}")
    return panels


# ---------------------------------------------------------------------------- the studies


@dataclass(frozen=True)
class TermFrequency:
    bins: str  # OUTPUT_bins.csv of studies/term_frequency.py
    output: str = "term_frequency.png"


def term_frequency(options):
    """Draw accuracy and log-probability over the terms' frequency so far, a line a checkpoint."""
    labels = {"acc": "accuracy", "logprob": "log-probability of the right answer (nats)"}
    with expecting(options.bins, "OUTPUT_bins.csv of studies/term_frequency.py"):
        rows = read_csv(options.bins)
        shots = max((row["shots"] for row in rows), key=int)
        rows = [row for row in rows if row["shots"] == shots]
        kinds = sorted({(row["model"], row["task"]) for row in rows})
        steps = shades(sorted({row["step"] for row in rows}, key=float))
        figure, grid_axes = grid(2 * len(kinds), 2, 5, 4)
        panels = itertools.product(kinds, labels.items())
        for axes, ((model, task), (metric, label)) in zip(grid_axes, panels):
            errorbars(axes, rows, "step", steps, "frequency", metric, f"{metric}_stderr",
                      model=model, task=task)
            axes.set_xscale("symlog", linthresh=1)  # some terms were never seen
            axes.set(xlabel="times seen before the checkpoint (deciles of the terms)",
                     ylabel=label, title=f"{model}, {task}, {shots}-shot")
    grid_axes[0].legend(title="step")
    return finish(figure, options.output)


def memorization(folder, output):
    """Draw matched lengths over steps, and memorized rows per window against Poisson quantiles.

    folder: where `analyse` of studies/memorization.py wrote rates.csv and windows.csv.
    """
    rates, windows = (read_csv(folder / name) for name in ("rates.csv", "windows.csv"))
    models = sorted({row["model"] for row in rates}, key=by_size)
    colours = {"seen": "black", "not seen yet": "grey"}
    figure, axes = grid(2 * len(models), len(models), 4 + 2 / len(models), 3.75, sharey="row")
    for model, top, bottom in zip(models, axes, axes[len(models):]):
        errorbars(top, rates, "rows", colours, "step", "mean_length", model=model)
        top.set(title=model, xlabel="step")
        step, size = max(((row["step"], row["window"]) for row in windows
                          if row["model"] == model), key=lambda pair: float(pair[0]))
        memorized, times = columns(windows, "memorized", "windows", model=model, step=step)
        counts = memorized.repeat(times.astype(int))  # of each window, sorted
        bottom.set(title=f"step {step}, {len(counts):,} windows of {size} rows")
        if len(counts):
            x = poisson_quantiles(len(counts), counts.mean())
            bottom.plot(x, counts, ".")
            bottom.plot([0, max(x)], [0, max(x)], "--", color="grey")
            bottom.set(xlabel=f"Poisson, rate {counts.mean():.2f}")
    axes[0].set(ylabel="correct tokens before the first wrong one")
    axes[len(models)].set(ylabel="memorized rows per window")
    axes[0].legend()
    return finish(figure, output)


def poisson_quantiles(n, mean):
    """Return the n quantiles (i + 1/2) / n of a Poisson distribution, (n,) int64."""
    k = torch.arange(int(mean + 10 * mean**0.5) + 30, dtype=torch.float64)
    at_most_k = torch.special.gammaincc(k + 1, torch.full_like(k, mean))  # probability
    return np.searchsorted(at_most_k.numpy(), (np.arange(n) + 0.5) / n)


def differences(path, output):
    """Draw branch minus twin with its interval over steps, a panel for each measure."""
    rows = read_csv(path)
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    figure, grid_axes = grid(len(measures), min(3, len(measures)), 4.2, 3.4)
    for axes, measure in zip(grid_axes, measures):
        first = next(row for row in rows if row["measure"] == measure)
        axes.axhline(0, color="grey")
        errorbars(axes, rows, "measure", {measure: "C0"}, "step", "difference", "low", "high")
        axes.set(xlabel="step", ylabel="branch - twin (nats; cost: bits per byte)",
                 title=f"{measure}, {int(first['items']):,} item(s), {first['seeds']} seed(s)")
    return finish(figure, output)


def doses(path, output):
    """Draw what models learned of planted text by its dose, a panel a kind, a line a size."""
    rows = read_csv(path)
    kinds, sizes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("kind", "size"))
    figure, panels = grid(len(kinds), len(kinds), 4.2, 3.6)
    for kind, axes in zip(kinds, panels):
        errorbars(axes, rows, "size", shades(sizes), "dose", "value", "low", "high", kind=kind)
        axes.set_xscale("symlog", linthresh=1)
        axes.set(title=kind, xlabel="times planted")
    panels[0].legend()
    return finish(figure, output)


def places(pairs, output):
    """Draw each burst's gain over its step, from (step, gain) pairs, and means of neighbours."""
    figure, [axes] = grid(1, 1, 6, 3.6)
    pairs = np.array(sorted(pairs))
    means = np.array([part.mean(axis=0) for part in np.array_split(pairs, min(16, len(pairs)))])
    axes.plot(*pairs.T, ".", color="grey")
    axes.plot(*means.T, marker="o")
    axes.set(xlabel="step of the burst", ylabel="nats per token better than the mean",
             title="what remains of 12 exposures within 48 steps")
    return finish(figure, output)


def occupations(groups, output):
    """Draw models' log-odds of "she" over those of the training text, {name: (text's, models')}."""
    figure, [axes] = grid(1, 1, 6, 3.6)
    for name, (x, y) in groups.items():
        x, y = np.ravel(x), np.ravel(y)
        slope, intercept = np.polyfit(x, y, 1)
        [points] = axes.plot(x, y, ".", alpha=0.4)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, intercept + slope * ends, color=points.get_color(),
                  label=f"{name}: slope {slope:.2f}")
    axes.set(xlabel='log-odds of "she" in an occupation\'s sentences',
             ylabel='the model\'s log-odds of "she"')
    axes.legend()
    return finish(figure, output)


# ---------------------------------------------------------------------------- the window

ABSENT = 255  # stands for the loss of a token that has none


@dataclass(frozen=True)
class Window:
    losses: str  # OUTPUT.npy of eval.py losses, OUTPUT.json beside it; several with commas
    tokenizer: str = "20B_tokenizer.json"
    output: str = "window.html"


def window(options):
    """Write a page that shows rows of text, each token coloured by its loss at a chosen step.

    Runs measured on the same rows are shown side by side, other rows below. The page is
    assets/window.html with the JSON {scale, rows, series} in it. rows: [{name, seen, tokens}], each
    token as text. series: {run, first, n, T, steps, levels} for each run of a file. `levels` are
    its losses on the rows first to first + n - 1 in units of `scale` nats, base64 of bytes
    (steps, n, T).
    """
    tokenizer, rows, series, first_rows = load_tokenizer(options.tokenizer), [], [], {}
    for path in options.losses.split(","):
        digest, its_rows, checkpoints, losses = read_losses(path.removesuffix(".npy"), tokenizer)
        first = first_rows.setdefault(digest, len(rows))
        if first == len(rows):
            rows += its_rows
        _, n, T = losses.shape
        for run in dict.fromkeys(run for run, _ in checkpoints):
            at = [i for i, (other, _) in enumerate(checkpoints) if other == run]
            series.append({"run": run, "first": first, "n": n, "T": T,
                           "steps": [checkpoints[i][1] for i in at], "levels": losses[at]})
    scale = max(float(np.nanmax(one["levels"], initial=1)) for one in series) / (ABSENT - 1)
    for one in series:
        levels = np.rint(np.nan_to_num(one["levels"] / scale, nan=ABSENT)).astype(np.uint8)
        one["levels"] = base64.b64encode(levels).decode()
    data = json.dumps({"scale": scale, "rows": rows, "series": series}, ensure_ascii=False)
    page = (Path(__file__).parent / "assets" / "window.html").read_text(encoding="utf8")
    page = page.replace("{DATA}", data.replace("<", "\\u003c")).encode()  # a row may hold </script>
    with replacing(options.output) as file:
        file.write(page)
    print(f"{options.output}: {len(rows)} rows, losses in units of {scale:.3f} nats")


def read_losses(path, tokenizer):
    """Return the rows' SHA-256, [{name, seen, tokens}] of them, [(run, step)] and the losses.

    seen: the step in which the first run was trained on a row, if its checkpoints reach that far.
    losses: (checkpoints, rows, T) float32, memory-mapped; NaN where a row has no token.
    """
    with expecting(f"{path}.npy", "finished losses of the rows that its .json describes"):
        what, rows, losses = read_json(f"{path}.json"), [], load_npy(f"{path}.npy")
        tokens, digest = token_rows(what, tokenizer), what["sha256"]
        if hashlib.sha256(tokens.tobytes()).hexdigest() != digest:
            raise ValueError("the data, the text or the tokenizer is not the same as then")
        checkpoints = [(str(run), int(step or 0)) for run, step in what["checkpoints"]]
        expected = len(checkpoints), *tokens[:, 1:].shape
        wrong = (losses < -1e-3) | (losses > 1e4)  # rounding makes losses of -1e-6
        if wrong.any() or losses.dtype != np.float32 or losses.shape != expected:
            raise ValueError(f"{losses.dtype} {losses.shape}, expected float32 {expected} from 0 "
                             "to 10,000 nats")
        first_run = checkpoints[0][0]
        last = max(step for run, step in checkpoints if run == first_run)
        for i, ids in enumerate(tokens):
            row = {"tokens": [tokenizer.decode([token]) for token in ids[ids >= 0].tolist()]}
            if "text" in what:
                row["name"] = str(what["documents"][i] or f"text {i}")
            else:
                number, order = what["rows"][0] + i, what["order"]
                row["name"] = f"row {number} of {order['data']}"
                step = number // order["batch_size"]
                if step < last and "trained_on" not in what:  # the run was trained in this order
                    row["name"] += f", seen by {first_run} in step {step}"
                    row["seen"] = step
            rows.append(row)
    return digest, rows, checkpoints, losses


if __name__ == "__main__":
    command(sys.argv[1:], {
        "training": (Training, training), "curves": (Curves, curves),
        "term_frequency": (TermFrequency, term_frequency), "window": (Window, window)})
