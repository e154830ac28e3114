"""Several seeds in, table and figure out: what the README shows of a method.

    python tests/benchmarks/plot_results.py runs/ssde__* --name ssde_quick --group-by method
    python tests/benchmarks/plot_results.py --from-results ssde_quick

The first command reads finished run folders of any of the scripts and writes to `tests/benchmarks/results/`

* `NAME.csv`: the evaluations of all runs, with the columns `group` and `seed`,
* `NAME_final.csv`: a row per run with its scalar metrics,
* `NAME.png`: learning curves per task and bars of the final metrics,

and prints the table. The second needs only the two csv files. The numbers are interquartile means (IQM) with 95 %
percentile intervals of the stratified bootstrap over seeds, as Agarwal et al. 2021 (rliable) recommend for few seeds.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from rliable import library, metrics

RESULTS_DIR = Path(__file__).parent / "results"
# What NAME_final.csv says about a run; its other columns are metrics.
RUN_COLUMNS = ["group", "seed", "script", "tasks", "global_step", "wall_seconds", "steps_per_second"]
# Okabe & Ito 2008: told apart with every kind of colour vision; line styles repeat the message in black and white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINE_STYLES = ["-", "--", "-.", ":"]
PANELS_PER_ROW = BARS = 4


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of finished runs, several seeds of each group"""
    name: str | None = None
    """name of the files that are written"""
    from_results: str | None = None
    """redraw the files of this name from their csv files instead of reading run folders"""
    group_by: tuple[str, ...] = ()
    """arguments of the scripts whose values tell the groups apart, e.g. `method`; without any, the script does"""
    labels: tuple[str, ...] = ()
    """what to call the groups, in the order in which the run folders bring them; by default their arguments"""
    metrics: tuple[str, ...] = ()
    """metrics to show, in this order; all by default. The figure has bars for the first four"""
    reps: int = 2000
    """bootstrap resamples"""
    results_dir: Path = RESULTS_DIR
    """folder of the files"""


# ------------------------------------------------------------------------------------------------ reading the runs


def read_run(run_dir: Path, group_by: tuple[str, ...]) -> tuple[pd.DataFrame, dict]:
    """Evaluations and the row of final values of one run. Raises ValueError naming what is missing."""
    try:
        config = json.loads((run_dir / "config.json").read_text())
        results = json.loads((run_dir / "results.json").read_text())
        evaluations = pd.read_csv(run_dir / "evaluations.csv")
    except FileNotFoundError as error:
        raise ValueError(
            f"{run_dir}: not the folder of a finished run, {Path(error.filename).name} is missing"
        ) from None
    unknown = [name for name in group_by if name not in config["args"]]
    if unknown:
        known = ", ".join(sorted(config["args"]))
        raise ValueError(f"--group-by {unknown[0]}: {run_dir} has no such argument; it has {known}")
    group = group_label({name: config["args"][name] for name in group_by}) or results["script"]
    evaluations["label"] = task_labels(evaluations)
    run = {"group": group, "seed": results["seed"], "script": results["script"]}
    run |= {"tasks": " + ".join(evaluations["label"].unique())}
    run |= {name: results[name] for name in ("global_step", "wall_seconds", "steps_per_second")}
    run |= {name: value for name, value in results["metrics"].items() if type(value) in (int, float)}
    evaluations.insert(0, "group", group)
    evaluations.insert(1, "seed", results["seed"])
    return evaluations, run


def group_label(values: dict) -> str:
    """{"method": "ssde", "beta": 0.3} -> "ssde, beta=0.3": a word speaks for itself, a number needs its name."""
    return ", ".join(value if isinstance(value, str) else f"{name}={value}" for name, value in values.items())


def task_labels(evaluations: pd.DataFrame) -> pd.Series:
    """The task names of one run, with their index in front if a task comes twice in the sequence."""
    twice = evaluations.groupby("task")["task_index"].nunique().max() > 1
    names = evaluations["task"].astype(str)
    return evaluations["task_index"].astype(str) + " " + names if twice else names


def collect(run_dirs: tuple[Path, ...], group_by: tuple[str, ...]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluations and final values of all runs. Raises ValueError if two runs claim to be the same seed of a group."""
    pairs = [read_run(run_dir, group_by) for run_dir in run_dirs]
    seen: dict[tuple, Path] = {}
    for run_dir, (evaluations, run) in zip(run_dirs, pairs, strict=True):
        for label in evaluations["label"].unique():
            key = (run["group"], run["seed"], label)
            if key in seen:
                raise ValueError(
                    f"{seen[key]} and {run_dir} are both seed {run['seed']} of group {run['group']!r} on {label}: "
                    "name the argument in which they differ with --group-by, or leave one out"
                )
            seen[key] = run_dir
    evaluations = pd.concat([evaluations for evaluations, _ in pairs], ignore_index=True)
    return evaluations, pd.DataFrame([run for _, run in pairs])


# ------------------------------------------------------------------------------------------------------ statistics


def rename_groups(frames: list[pd.DataFrame], labels: tuple[str, ...]) -> None:
    """Give the groups other names, in place. Raises ValueError unless there is one for each and no two are alike."""
    groups = list(dict.fromkeys(frames[0]["group"]))
    if len(labels) != len(groups) or len(set(labels)) < len(labels):
        raise ValueError(f"--labels {' '.join(labels)}: must be a name for each of the groups {'; '.join(groups)}")
    for frame in frames:
        frame["group"] = frame["group"].map(dict(zip(groups, labels, strict=True)))


def measure_of(evaluations: pd.DataFrame) -> str:
    """What the curves show: success, or the return where no environment reports success."""
    return "success" if evaluations["success"].notna().any() else "episode_return"


def scores(evaluations: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """One row per group, metric, seed and task, in the columns `group, metric, seed, task, value`.

    The last evaluation of each task comes first. Success lies in [0, 1] on every task, so all tasks are one metric;
    returns of different tasks have different scales, so each task is a metric of its own. A scalar metric of a run
    belongs to all its tasks together.
    """
    measure = measure_of(evaluations)
    last = evaluations.sort_values("global_step", kind="stable").groupby(["group", "seed", "label"], sort=False).tail(1)
    last = last.sort_index().rename(columns={measure: "value"})
    last["metric"] = "success per task" if measure == "success" else "return, " + last["label"]
    scalars = final.melt(RUN_COLUMNS, var_name="metric").rename(columns={"tasks": "label"})
    columns = {"group": "group", "metric": "metric", "seed": "seed", "label": "task", "value": "value"}
    return pd.concat([part[list(columns)].rename(columns=columns) for part in (last, scalars)], ignore_index=True)


def aggregate(all_scores: pd.DataFrame, reps: int) -> pd.DataFrame:
    """IQM and 95 % stratified bootstrap interval for each metric and group, with the numbers of seeds and tasks.

    Seeds that lack a value (NaN or absent) on any of the group's tasks are left out; the interval of one seed is NaN.
    """
    rows = []
    for (metric, group), part in all_scores.groupby(["metric", "group"], sort=False):
        table = part.pivot(index="seed", columns="task", values="value").dropna(axis=1, how="all").dropna()
        row = {"metric": metric, "group": group, "seeds": 0 if table.empty else len(table), "tasks": table.shape[1]}
        row |= {"iqm": math.nan, "low": math.nan, "high": math.nan}
        if row["seeds"] > 0:
            row["iqm"] = metrics.aggregate_iqm(table.to_numpy())
        if row["seeds"] > 1:
            np.random.seed(0)  # rliable draws from numpy's global generator, whatever random_state it is given
            _, interval = library.get_interval_estimates(
                {"": table.to_numpy(dtype=float)}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=reps
            )
            row["low"], row["high"] = interval[""][:, 0]
        rows.append(row)
    return pd.DataFrame(rows)


def select(table: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """The rows of the named metrics, in the order of the names; all rows if there are no names."""
    for name in names:
        if name not in set(table["metric"]):
            raise ValueError(f"--metrics {name}: not here; there are {', '.join(table['metric'].unique())}")
    return pd.concat([table[table["metric"] == name] for name in names]) if names else table


def markdown(table: pd.DataFrame) -> str:
    """A line per metric, a column per group: `IQM [interval]`, and where they differ from the heading's, the seeds."""
    groups = list(dict.fromkeys(table["group"]))
    seeds = {group: table.loc[table["group"] == group, "seeds"].max() for group in groups}
    lines = ["| metric | " + " | ".join(f"{group} ({count(seeds[group], 'seed')})" for group in groups) + " |"]
    lines.append("|---" * (len(groups) + 1) + "|")
    for metric, part in table.groupby("metric", sort=False):
        cells = []
        for group in groups:
            row = part[part["group"] == group]
            if row.empty or row["seeds"].item() == 0:
                cells.append("n/a")
                continue
            cell = number(row["iqm"].item())
            if row["seeds"].item() > 1:
                cell += f" [{number(row['low'].item())}, {number(row['high'].item())}]"
            if row["seeds"].item() != seeds[group]:
                cell += f" ({count(row['seeds'].item(), 'seed')})"
            cells.append(cell)
        tasks = part["tasks"].max()
        lines.append(f"| {metric}{f' ({tasks} tasks)' if tasks > 1 else ''} | " + " | ".join(cells) + " |")
    note = "Interquartile mean and 95 % stratified bootstrap interval over seeds"
    note += ", and over tasks where their number is given." if table["tasks"].max() > 1 else "."
    return "\n".join([*lines, "", note])


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def number(value: float) -> str:
    """Two decimals for what is near 1, three significant digits for larger and smaller numbers."""
    if value != 0 and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


# ---------------------------------------------------------------------------------------------------------- figure


def curves(part: pd.DataFrame, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and values (seeds, T) of one group on one task.

    Seeds need not be evaluated at the same steps (an episode ends where it ends): each is interpolated linearly at the
    steps of all of them, over the stretch that all of them cover.
    """
    seeds = [seed.groupby("global_step")[value].last().dropna() for _, seed in part.groupby("seed")]
    seeds = [seed for seed in seeds if len(seed)]
    if not seeds:
        return np.empty(0), np.empty((0, 0))
    steps = np.unique(np.concatenate([seed.index for seed in seeds]))
    steps = steps[(steps >= max(seed.index[0] for seed in seeds)) & (steps <= min(seed.index[-1] for seed in seeds))]
    return steps, np.stack([np.interp(steps, seed.index, seed.to_numpy()) for seed in seeds])


def mean_over_tasks(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Mean success of each run over all its tasks at each evaluation; a task not yet evaluated counts 0."""
    index = ["group", "seed", "global_step"]
    table = evaluations.pivot_table(index=index, columns="label", values="success", aggfunc="last")
    runs = []
    for _, run in table.groupby(["group", "seed"]):
        own = run.dropna(axis=1, how="all")  # another group may have other tasks
        runs.append(own.ffill().fillna(0).mean(axis=1).rename("success"))
    return pd.concat(runs).reset_index()


def draw(evaluations: pd.DataFrame, table: pd.DataFrame, path: Path) -> None:
    """Learning curves, a panel per task and a colour per group (mean line, min-max band over seeds), bars below."""
    evaluations, by_phase = align_phases(evaluations)
    measure, groups = measure_of(evaluations), list(dict.fromkeys(evaluations["group"]))
    style = {
        group: {"color": COLOURS[i % len(COLOURS)], "linestyle": LINE_STYLES[i % len(LINE_STYLES)], "linewidth": 1.6}
        for i, group in enumerate(groups)
    }
    panels = list(evaluations.groupby("label", sort=False))
    several_tasks = evaluations.groupby(["group", "seed"])["label"].nunique().max() > 1
    if measure == "success" and several_tasks:
        panels.insert(0, ("mean of all tasks", mean_over_tasks(evaluations)))
    bars = list(table.loc[table["iqm"].notna(), "metric"].unique())[:BARS]

    columns = min(PANELS_PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    bar_height = 0.75 + 0.24 * len(groups)
    panel_height = {1: 3.6, 2: 2.9}.get(columns, 2.0)
    heights = [0.5 + panel_height * rows] + [bar_height] * bool(bars)
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    axes = upper.subplots(rows, columns, sharex=True, sharey=measure == "success", squeeze=False)
    for axis, (label, part) in zip(axes.flat, panels, strict=False):
        for group in groups:
            steps, values = curves(part[part["group"] == group], measure)
            if len(steps):
                axis.plot(steps, values.mean(0), **style[group])
                band = values.min(0), values.max(0)
                axis.fill_between(steps, *band, color=style[group]["color"], alpha=0.18, linewidth=0)
        for border in phase_borders(evaluations):
            axis.axvline(border, color="0.6", linewidth=0.6, zorder=0)
        axis.set_title(label, fontsize=9)
        tidy(axis)
        if not by_phase:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=by_phase))
        if measure == "success":
            axis.set_ylim(-0.04, 1.04)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    for axis in list(axes.flat)[max(0, len(panels) - columns) : len(panels)]:
        axis.tick_params(labelbottom=True)  # the last panel of each column
    upper.supxlabel("phases, each drawn with the same width" if by_phase else "steps", fontsize=9)
    upper.supylabel("success" if measure == "success" else "episode return", fontsize=9)
    seeds = evaluations.groupby("group")["seed"].nunique()
    handles = [Line2D([], [], label=f"{group} ({count(seeds[group], 'seed')})", **style[group]) for group in groups]
    longest = max(len(handle.get_label()) for handle in handles) + 6  # the line sample is as wide as six letters
    ncols = min(4, len(groups), max(1, 110 // longest))
    upper.legend(handles=handles, loc="outside upper center", ncols=ncols, fontsize=9, frameon=False)

    if bars:
        for axis, metric in zip(lower[0].subplots(1, len(bars), sharey=True, squeeze=False)[0], bars, strict=True):
            part = table[table["metric"] == metric].set_index("group").reindex(groups)
            position = np.arange(len(groups))
            axis.barh(position, part["iqm"], color=[style[group]["color"] for group in groups], alpha=0.85, height=0.65)
            axis.hlines(position, part["low"], part["high"], color="black", linewidth=1.4)
            axis.set_yticks(position, groups)
            axis.set_ylim(len(groups) - 0.5, -0.5)  # the first group on top
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.set_title(metric.replace("_", " "), fontsize=9)
            tidy(axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def align_phases(evaluations: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """`global_step` in phases where runs ended them at different steps (a visit that stops when solved), and whether.

    The mean over seeds at one step would mix phases there. Every phase gets the width 1: its end, where there is always
    an evaluation, lies at a whole number.
    """
    steps = evaluations.groupby(["group", "seed", "phase"])["global_step"].max().unstack("phase")
    if (steps.nunique() <= 1).all():
        return evaluations, False
    run = pd.MultiIndex.from_frame(evaluations[["group", "seed", "phase"]])
    end = steps.stack().loc[run].to_numpy()
    start = steps.shift(axis=1, fill_value=0).stack().loc[run].to_numpy()
    phases = evaluations["phase"] + (evaluations["global_step"] - start) / (end - start)
    return evaluations.assign(global_step=phases), True


def phase_borders(evaluations: pd.DataFrame) -> list[float]:
    """Steps at which a phase ended, the last phase of a run left out."""
    ends = evaluations.groupby(["group", "seed", "phase"])["global_step"].max()
    return sorted({end for _, run in ends.groupby(["group", "seed"]) for end in run.iloc[:-1]})


def tidy(axis) -> None:
    """The look that all panels share."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


# ------------------------------------------------------------------------------------------------------------ main


def main(args: Args) -> str:
    """Write the files and return the markdown table. Raises ValueError for what cannot be shown."""
    if bool(args.runs) == bool(args.from_results) or bool(args.runs) != bool(args.name):
        raise ValueError("give either run folders and --name NAME, or --from-results NAME")
    if args.reps < 1:
        raise ValueError(f"--reps {args.reps}: must be at least 1")
    name = args.name or args.from_results
    evaluations_csv, final_csv = args.results_dir / f"{name}.csv", args.results_dir / f"{name}_final.csv"
    if args.runs:
        evaluations, final = collect(args.runs, args.group_by)
    else:
        for path in (evaluations_csv, final_csv):
            if not path.is_file():
                raise ValueError(f"--from-results {name}: {path} is missing")
        evaluations, final = pd.read_csv(evaluations_csv), pd.read_csv(final_csv)
    if args.labels:
        rename_groups([evaluations, final], args.labels)
    table = select(aggregate(scores(evaluations, final), args.reps), args.metrics)
    if args.runs:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        evaluations.to_csv(evaluations_csv, index=False)
        final.to_csv(final_csv, index=False)
    draw(evaluations, table, args.results_dir / f"{name}.png")
    return markdown(table)


if __name__ == "__main__":
    try:
        print(main(tyro.cli(Args)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
