"""The heat map of BABILong, tasks by context size, red to green; that of retrieval; and perplexity by context length."""

import io
from dataclasses import dataclass

import numpy as np

from lrmt.evaluation.results import pool_depths
from lrmt.lengths import format_tokens


@dataclass(frozen=True)
class Panel:
    """One heat map: `values [rows, columns]` in 0..100, NaN where there is none.

    `groups`: of the rows; a wider gap where they change. `italic`: the rows, by number, that were not measured here.
    """

    rows: list[str]
    columns: list[str]
    values: np.ndarray
    title: str = ""
    groups: list[str] | None = None
    italic: frozenset[int] = frozenset()


def draw_heatmap(records: list[dict]) -> bytes:
    """A PNG with a row for each (task, model), a column for each context size, and accuracies of 0..100.

    Cells at several depths are one, their mean; cells that failed, at one depth even, stay empty.
    """
    rows = list(dict.fromkeys((record["task"], record["model"]) for record in records))
    tasks = list(dict.fromkeys(task for task, _ in rows))
    rows.sort(key=lambda row: tasks.index(row[0]))
    columns = sorted({(record["length_tokens"], record["segments"]) for record in records})
    grid = np.full((len(rows), len(columns)), np.nan)
    for record in pool_depths(records):
        if record["accuracy"] is not None:
            row, column = (record["task"], record["model"]), (record["length_tokens"], record["segments"])
            grid[rows.index(row), columns.index(column)] = 100 * record["accuracy"]
    return draw_panels(
        [
            Panel(
                rows=[f"{task} · {model}" for task, model in rows],
                columns=[f"{format_tokens(tokens)}\n{segments} seg." for tokens, segments in columns],
                values=grid,
                groups=[task for task, _ in rows],
            )
        ]
    )


def draw_depths(records: list[dict]) -> bytes:
    """A PNG of depth (0 at the top) by context size, a panel for each task and model: where in the text a fact is found."""
    from matplotlib.colors import LinearSegmentedColormap

    records = [record for record in records if record.get("depth") is not None and record["accuracy"] is not None]
    panels = []
    for task, model in dict.fromkeys((record["task"], record["model"]) for record in records):
        of_panel = [record for record in records if (record["task"], record["model"]) == (task, model)]
        depths = sorted({record["depth"] for record in of_panel})
        tokens = sorted({record["length_tokens"] for record in of_panel})
        grid = np.full((len(depths), len(tokens)), np.nan)
        for record in of_panel:
            grid[depths.index(record["depth"]), tokens.index(record["length_tokens"])] = 100 * record["accuracy"]
        rows, columns = [f"{depth:.0%}" for depth in depths], [format_tokens(n) for n in tokens]
        panels.append(Panel(rows=rows, columns=columns, values=grid, title=f"{task} · {model}"))
    return draw_panels(
        panels,
        LinearSegmentedColormap.from_list("needle", ["#F0496E", "#EBB839", "#0CD79F"]),
        ylabel="Depth",
    )


def draw_panels(panels: list[Panel], colours="RdYlGn", ylabel: str = "Tasks") -> bytes:
    """A PNG of heat maps one below the other, in BABILong's convention: tasks by context size, red to green, 0..100."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cell_width, cell_height = 0.8, 0.5
    label_width = 0.085 * max(len(row) for panel in panels for row in panel.rows)
    title_width = 0.085 * max(len(line) for panel in panels for line in panel.title.split("\n"))
    width = max(1.6, title_width, max(len(panel.columns) for panel in panels) * cell_width)
    heights = [len(panel.rows) * cell_height + 1.0 + 0.5 * bool(panel.title) for panel in panels]
    figure = plt.figure(figsize=(width + label_width + 1.6, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, subplot in zip(panels, axes, strict=True):
        mesh = draw_panel(panel, subplot, plt.get_cmap(colours))
        subplot.set_ylabel(ylabel)
    share = min(1.0, 6.0 / figure.get_figheight())  # a bar as high as a page is of no use
    bar = figure.colorbar(
        mesh, ax=axes, label="Accuracy, %", ticks=range(0, 101, 25), fraction=0.05, pad=0.02, shrink=share, aspect=30
    )
    bar.outline.set_visible(False)
    return to_png(figure)


def draw_panel(panel: Panel, axes, colours):
    axes.set_facecolor("0.93")
    mesh = axes.pcolormesh(panel.values, cmap=colours, vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    for (y, x), value in np.ndenumerate(panel.values):
        if not np.isnan(value):
            dark = np.dot(colours(value / 100)[:3], (0.299, 0.587, 0.114)) < 0.5
            axes.text(x + 0.5, y + 0.5, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black")
    groups = panel.groups or []
    for y in range(1, len(groups)):
        if groups[y] != groups[y - 1]:
            axes.axhline(y, color="white", linewidth=4)
    axes.set_xticks(np.arange(len(panel.columns)) + 0.5, panel.columns)
    axes.set_yticks(np.arange(len(panel.rows)) + 0.5, panel.rows)
    for y in panel.italic:
        axes.get_yticklabels()[y].set(style="italic", color="0.35")
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("Context size")
    axes.set_title(panel.title, loc="left", fontsize="medium")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def draw_retrieval(shares: np.ndarray, blocks: list[int]) -> bytes:
    """A PNG of `shares [layers, blocks]`, each a share of the attention in 0..1; `blocks` are the numbers of the columns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_layers = len(shares)
    width, height = min(0.45 * len(blocks), 24), min(0.45 * num_layers, 12)
    figure = plt.figure(figsize=(max(width, 2.2) + 2.2, max(height, 1) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(100 * shares, cmap="Blues", vmin=0, edgecolors="white", linewidth=0.5)
    axes.set_xticks(*spread(blocks, width / 0.45), rotation=90 if blocks[-1] > 999 else 0)
    axes.set_yticks(*spread(range(num_layers), height / 0.45))
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("Block")
    axes.set_ylabel("Layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, label="Share of the attention, %", fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    return to_png(figure)


def draw_memory(probability: np.ndarray, tokens: list[list[str | None]], sure: float, notes: list[dict]) -> bytes:
    """A PNG of what a memory says: its vectors by segments, coloured by probability `[segments, k]`, NaN where there is none; each
    token is written where it is first said with the probability `sure`, as far as there is room. Lines mark where notes were said,
    green, and lost, red.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count, k = probability.shape
    width, height = min(max(0.6 * count, 3.0), 24.0), min(0.4 * k, 24.0)
    figure = plt.figure(figsize=(width + 1.8, height + 1.4), layout="constrained")
    axes = figure.add_subplot(facecolor="0.93")
    mesh = axes.pcolormesh(probability.T, cmap="Blues", vmin=0, vmax=1)
    room = 0.55 * count / width  # segments that a token's text covers
    for i in range(k):
        free, before = 0.0, None
        for s in range(count):
            token = tokens[s][i] if probability[s, i] >= sure else None
            if token is not None and token != before and s >= free:
                label = escape(token)
                axes.text(s + 0.1, i + 0.5, label, va="center", fontsize=8, color="white", parse_math=False)
                free = s + room * max(1.0, len(label) / 5)
            before = token
    for first, last in [stretch for note in notes for stretch in note["said"]]:
        axes.axvline(first - 1, color="tab:green", linewidth=3)
        if last < count:
            axes.axvline(last, color="tab:red", linewidth=3)
    axes.set_xticks(*spread(range(1, count + 1), width / 0.6))
    axes.set_yticks(*spread(range(1, k + 1), height / 0.4))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xlabel("Segment")
    axes.set_ylabel("Memory vector")
    figure.colorbar(mesh, ax=axes, label="Probability", fraction=0.05, pad=0.02).outline.set_visible(False)
    return to_png(figure)


def draw_attention(
    panels: list[tuple[str, np.ndarray, list[str], list[str]]], looked: np.ndarray, answer: list[str]
) -> bytes:
    """A PNG of shares of attention: for each `(title, shares [k, W], k rows, W columns)` what was looked at while writing, and
    below how the tokens of the `answer` looked at the memory, `[answer, n]`, NaN where it had fewer vectors; without any, nothing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(f"{title}: what was looked at while writing, by memory vector", *rest) for title, *rest in panels]
    if looked.shape[1]:
        numbers = [str(i + 1) for i in range(looked.shape[1])]
        panels.append(("what the answer looked at, by memory vector", looked, answer, numbers))
    widest = min(max(0.14 * max(panel[1].shape[1] for panel in panels), 5.0), 24.0)
    heights = [min(0.28 * len(panel[1]), 24.0) + 1.5 for panel in panels]
    figure = plt.figure(figsize=(widest + 2.0, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (title, shares, rows, columns), subplot in zip(panels, axes, strict=True):
        subplot.set_facecolor("0.93")
        mesh = subplot.pcolormesh(100 * shares, cmap="Blues", vmin=0)
        subplot.set_xticks(*spread([escape(text) for text in columns], widest / 0.14), rotation=90, fontsize=6)
        subplot.set_yticks(*spread([escape(text) for text in rows], 24.0 / 0.28), fontsize=7)
        for label in [*subplot.get_xticklabels(), *subplot.get_yticklabels()]:
            label.set_parse_math(False)
        subplot.invert_yaxis()
        subplot.tick_params(length=0)
        subplot.set_title(title, loc="left", fontsize="medium")
        figure.colorbar(mesh, ax=subplot, label="%", fraction=0.03, pad=0.01).outline.set_visible(False)
    return to_png(figure)


def escape(token: str) -> str:
    """A token as a label: its spaces, tabs and line breaks are seen."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def spread(labels, room: float) -> tuple[np.ndarray, list]:
    """Where ticks stand, and their labels: as many as there is room for."""
    labels = list(labels)
    step = max(1, -(-len(labels) // max(1, int(room))))
    return np.arange(0, len(labels), step) + 0.5, labels[::step]


def draw_perplexity(records: list[dict]) -> bytes:
    """A PNG with a line for each model: perplexity, with its standard error, against context tokens on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for model in dict.fromkeys(record["model"] for record in records):
        line = sorted((r for r in records if r["model"] == model), key=lambda r: r["length_tokens"])
        tokens, values = ([r[key] for r in line] for key in ("length_tokens", "perplexity"))
        errors = [r["perplexity"] * (r["nll_stderr"] or 0.0) for r in line]
        axes.errorbar(tokens, values, errors, marker="o", capsize=3, label=model)
    axes.set_ylabel("Perplexity")
    return over_tokens(figure, axes, {record["length_tokens"] for record in records}, "Context, tokens")


def draw_costs(records: list[dict]) -> bytes:
    """A PNG with a line for each method: FLOPs against tokens, both on log axes."""
    return draw_lines([(r["method"], r["tokens"], r["flops"]) for r in records], "Tokens", "FLOPs")


def draw_lines(points: list[tuple[str, int, float]], xlabel: str, ylabel: str) -> bytes:
    """A PNG with a line for each label of points `(label, x, y)`, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for label in dict.fromkeys(label for label, _, _ in points):
        line = [(x, y) for other, x, y in points if other == label]
        axes.plot(*zip(*line, strict=True), marker="o", label=label)
    axes.set_yscale("log")
    axes.set_ylabel(ylabel)
    return over_tokens(figure, axes, {x for _, x, _ in points}, xlabel)


def over_tokens(figure, axes, tokens: set[int], label: str) -> bytes:
    """A PNG of lines over numbers of tokens, or of segments, on a log axis that has a tick for each."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(tokens), [format_tokens(n) for n in sorted(tokens)])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return to_png(figure)


def to_png(figure) -> bytes:
    """Draws a figure and closes it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()
