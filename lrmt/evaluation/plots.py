"""The heat map of BABILong: tasks by context size, red to green."""

import io

import numpy as np


def draw_heatmap(records: list[dict]) -> bytes:
    """A PNG with a row for each (task, model), a column for each context size, and accuracies of 0..100."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(dict.fromkeys((record["task"], record["model"]) for record in records))
    tasks = list(dict.fromkeys(task for task, _ in rows))
    rows.sort(key=lambda row: tasks.index(row[0]))
    columns = sorted({(record["length_tokens"], record["segments"]) for record in records})
    grid = np.full((len(rows), len(columns)), np.nan)
    for record in records:
        row, column = (record["task"], record["model"]), (record["length_tokens"], record["segments"])
        grid[rows.index(row), columns.index(column)] = 100 * record["accuracy"]

    cell_width, cell_height = 0.8, 0.5
    width, height = len(columns) * cell_width, len(rows) * cell_height
    figure = plt.figure(figsize=(max(width, 1.6) + 2.9, height + 1.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.93")
    colours = plt.get_cmap("RdYlGn")
    mesh = axes.pcolormesh(grid, cmap=colours, vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = np.dot(colours(value / 100)[:3], (0.299, 0.587, 0.114)) < 0.5
            axes.text(x + 0.5, y + 0.5, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black")
    for y in range(1, len(rows)):
        if rows[y][0] != rows[y - 1][0]:
            axes.axhline(y, color="white", linewidth=4)
    labels = [f"{format_tokens(tokens)}\n{segments} seg." for tokens, segments in columns]
    axes.set_xticks(np.arange(len(columns)) + 0.5, labels)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [f"{task} · {model}" for task, model in rows])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("Context size")
    axes.set_ylabel("Tasks")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, label="Accuracy, %", ticks=range(0, 101, 25), fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def format_tokens(tokens: int) -> str:
    """512, 1k, 8.2k, 16k, 1M: at most three figures, 1k = 1000."""
    if tokens < 1000:
        return str(tokens)
    value, unit = (tokens / 1000, "k") if tokens < 999_500 else (tokens / 1_000_000, "M")
    return f"{value:.1f}".removesuffix(".0") + unit if value < 10 else f"{value:.0f}{unit}"
