"""Runs in, curves and a table out: interquartile means and intervals over seeds.

    python -m common.plot sweeps/nbsp                                         # every run below this folder
    python -m common.plot runs/ssde_? runs/finetune_? --metrics final_success forgetting --out report
    python -m common.plot --from-results tests/benchmarks/results/ssde_three_tasks --out report

The table is printed and written to OUT.md, the learning curves to OUT.png: `plot.md` and `plot.png` in the folder that
holds all the runs, unless --out says where. Several scripts get a table and a figure each (OUT_nbsp.png, ...).
Unfinished runs are drawn as far as they are, the table is of finished ones. With --csv the numbers are kept too, in
OUT.csv and OUT_final.csv, which --from-results reads; it writes nothing without --out.

Interquartile means (IQM) with 95 % percentile intervals of the stratified bootstrap over seeds are what Agarwal et al.
2021 (rliable) recommend for few seeds. Three seeds of one task have their least and greatest value as the interval;
fewer than three have none.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from common import cli
from common.cli import CONFIG, ArgumentError, read_json, words_of
from common.recorder import EVALUATIONS, RESULTS

ROOT = Path(__file__).resolve().parents[1]
# Arguments that make no group: what changes no result, and `env_id`, since every environment has its own panel and row.
NO_GROUP = cli.OUTPUT_ARGS | {"seed", "compile", "evaluate", "episodes", "reference", "env_id"}
# What OUT_final.csv says about a run; its other columns are metrics.
RUN_COLUMNS = ["run", "group", "seed", "script", "tasks", "finished", "global_step", "wall_seconds", "steps_per_second"]
# Okabe & Ito 2008: told apart with every kind of colour vision; line styles repeat the message in black and white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINE_STYLES = ["-", "--", "-.", ":"]
PANELS_PER_ROW = 4
FEWEST = 3  # runs that have an interval


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders that hold runs at any depth, or runs
    out: Path | None = None  # path of the files that are written, without .md or .png
    csv: bool = False  # also write OUT.csv (evaluations) and OUT_final.csv (final values)
    from_results: Path | None = None  # instead of runs: the path, without .csv, of what --csv wrote
    group_by: tuple[str, ...] = ()  # arguments that tell the groups apart; by default all that differ, but the seed
    labels: tuple[str, ...] = ()  # what to call the groups, in the order of the table
    metrics: tuple[str, ...] = ()  # metrics in the table, in this order, or `all`; by default those without a `/`
    reps: cli.PositiveInt = 2000  # bootstrap resamples


# ------------------------------------------------------------------------------------------------ reading the runs


def find_runs(folders: Iterable[Path]) -> dict[str, list[dict]]:
    """Every run below the folders, by script: `run` (its folder), `args`, `results` (empty while unfinished) and
    `evaluations`. Raises ArgumentError where there is none or one cannot be read.
    """
    scripts: dict[str, dict[Path, dict]] = {}
    for folder in folders:
        configs = sorted({*folder.rglob(CONFIG), *folder.glob(f"*/{CONFIG}")})  # the second follows links
        for config in configs:
            run = config.parent
            try:
                stored = read_json(config.read_text(encoding="utf-8"))
                finished, evaluated = (run / RESULTS).is_file(), (run / EVALUATIONS).is_file()
                results = read_json((run / RESULTS).read_text(encoding="utf-8")) if finished else {}
                evaluations = pd.read_csv(run / EVALUATIONS) if evaluated else pd.DataFrame()
                one = {"run": str(run), "args": stored["args"], "results": results, "evaluations": evaluations}
                script = stored.get("script") or results["script"]  # before format 2 it stood in the results only
                one["args"]["seed"]  # all our runs have one
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ArgumentError(f"{run}: no readable run ({type(error).__name__}: {error})") from None
            scripts.setdefault(script, {})[config.resolve()] = one
        if not configs:
            raise ArgumentError(f"{folder}: holds no run")
    return {script: list(runs.values()) for script, runs in scripts.items()}


def telling_apart(runs: list[dict]) -> list[str]:
    """Arguments that differ between the runs of a script, but those that follow from others (what a preset sets)."""
    names: list[str] = []
    known = dict.fromkeys(name for one in runs for name in one["args"] if name not in NO_GROUP)
    for name in sorted(known, key=lambda name: name not in ("method", "preset")):
        kinds = [{json.dumps([one["args"].get(n) for n in some]) for one in runs} for some in (names, [*names, name])]
        if len(kinds[1]) > len(kinds[0]):
            names.append(name)
    return names


def group_label(values: dict) -> str:
    """{"method": "ssde", "beta": 0.3} -> "ssde, beta=0.3": a word speaks for itself, a number needs its name."""
    return ", ".join(value if isinstance(value, str) else f"{name}={value}" for name, value in values.items())


def task_labels(evaluations: pd.DataFrame) -> pd.Series:
    """The task names, with their index in front if in any run a task came twice: all runs need the same names."""
    twice = evaluations.groupby(["run", "task"])["task_index"].nunique().max() > 1
    return evaluations["task_index"].astype(str) + " " + evaluations["task"] if twice else evaluations["task"]


def collect(script: str, runs: list[dict], group_by: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluations of the runs of a script, and a row for each run, with its final values if it is finished.

    Raises ArgumentError if two runs claim to be the same seed of a group on a task.
    """
    parts, rows = [], []
    for one in runs:
        args, results = one["args"], one["results"]
        group = group_label({name: args[name] for name in group_by if name in args}) or script
        key = {"run": one["run"], "group": group, "seed": args["seed"]}
        if len(one["evaluations"]):
            parts.append(one["evaluations"].assign(**key))
        row = key | {"script": script, "tasks": "", "finished": bool(results)}
        row |= {name: results.get(name) for name in RUN_COLUMNS[len(row) :]}
        metrics = results.get("metrics", {}).items()
        rows.append(row | {name: value for name, value in metrics if type(value) in (int, float)})
    if not parts:
        raise ArgumentError(f"{runs[0]['run']}: no evaluation yet, nor in another run of {script}.py")
    evaluations, final = pd.concat(parts, ignore_index=True), pd.DataFrame(rows)
    evaluations["label"] = task_labels(evaluations)
    tasks = evaluations.groupby("run")["label"].agg(lambda labels: " + ".join(labels.unique()))
    final["tasks"] = final["run"].map(tasks).fillna("")
    for (group, seed, label), part in evaluations.groupby(["group", "seed", "label"], sort=False)["run"]:
        if part.nunique() > 1:
            raise ArgumentError(
                f"{' and '.join(part.unique()[:2])} are both seed {seed} of group {group!r} on {label}: "
                "name the argument in which they differ with --group-by, or leave one out"
            )
    return evaluations, final


def read_results(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What --csv wrote. Older files do not name their runs, which are all finished."""
    frames = []
    for file in (Path(f"{path}.csv"), Path(f"{path}_final.csv")):
        if not file.is_file():
            raise ArgumentError(f"--from-results {path}: {file} is missing")
        try:
            frame = pd.read_csv(file, keep_default_na=False, na_values=[""])  # a group may be called None
            names = frame["group"] + " " + frame["seed"].astype(str)
        except (OSError, ValueError, KeyError) as error:
            raise ArgumentError(f"--from-results {path}: {file} is not what --csv wrote ({words_of(error)})") from None
        frames.append(frame if "run" in frame else frame.assign(run=names))
    return frames[0], frames[1] if "finished" in frames[1] else frames[1].assign(finished=True)


# ------------------------------------------------------------------------------------------------------ statistics


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean along the first axis: the mean without the lowest and the highest quarter.

    scipy.stats.trim_mean gives the same, 50 times slower, and the bootstrap calls it thousands of times.
    """
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def interval(values: np.ndarray, reps: int, estimate=iqm) -> np.ndarray:
    """95 % bootstrap interval (2, T) of `estimate(values)` (T,); values: (runs, tasks or steps). NaN for few runs."""
    from rliable import library  # slow to import

    if len(values) < FEWEST:
        return np.full((2, *estimate(values).shape), math.nan)
    np.random.seed(0)  # rliable draws from numpy's global generator, whatever random_state it is given
    return library.get_interval_estimates({"": values}, estimate, reps=reps)[1][""]


def measure_of(evaluations: pd.DataFrame) -> str:
    """What the curves show: success, or the return where no environment reports success."""
    return "success" if evaluations["success"].notna().any() else "episode_return"


def scores(evaluations: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """A row per group, metric, seed and task of the finished runs, in the columns `group, metric, seed, task, value`.

    The last evaluation of each task comes first. Success lies in [0, 1] on every task, so all tasks are one metric;
    returns of different tasks have different scales, so each task is a metric of its own, and so are a run's scalar
    metrics where a group has runs on different tasks.
    """
    final, measure = final[final["finished"]], measure_of(evaluations)
    last = evaluations[evaluations["run"].isin(final["run"])].sort_values("global_step", kind="stable")
    last = last.groupby(["run", "label"], sort=False).tail(1).sort_index()
    metric = "success per task" if measure == "success" else "return, " + last["label"]
    last = last.assign(metric=metric, task=last["label"], value=last[measure])
    scalars = final.melt([name for name in RUN_COLUMNS if name in final], var_name="metric")
    scalars = scalars.rename(columns={"tasks": "task"}).astype({"value": float})
    if final.groupby("group")["tasks"].nunique().max() > 1:
        scalars["metric"] += ", " + scalars["task"]
    columns = ["group", "metric", "seed", "task", "value"]
    return pd.concat([last[columns], scalars[columns]], ignore_index=True)


def select(all_scores: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """The rows of the named metrics, in the order of the names; without names, of those that have no `/`."""
    known = all_scores["metric"].unique()
    if not names:  # a task may have a `/`: return, dmc/dog-run
        names = [metric for metric in known if "/" not in metric.partition(", ")[0]]
    names = known if tuple(names) == ("all",) else names
    return pd.concat([all_scores[:0], *(all_scores[all_scores["metric"] == name] for name in names)])


def aggregate(all_scores: pd.DataFrame, reps: int) -> pd.DataFrame:
    """IQM and 95 % stratified bootstrap interval for each metric and group, with the numbers of seeds and tasks.

    Seeds that lack a value (NaN or absent) on any of the group's tasks are left out.
    """
    rows = []
    for (metric, group), part in all_scores.groupby(["metric", "group"], sort=False):
        table = part.pivot(index="seed", columns="task", values="value").dropna(axis=1, how="all").dropna()
        row = {"metric": metric, "group": group, "seeds": table.size and len(table), "tasks": table.shape[1]}
        if row["seeds"]:
            values = table.to_numpy(float)
            low, high = interval(values, reps, lambda sample: iqm(sample.reshape(-1, 1)))[:, 0]
            row |= {"iqm": iqm(values.ravel()), "low": low, "high": high}
        rows.append(row)
    return pd.DataFrame(rows, columns=["metric", "group", "seeds", "tasks", "iqm", "low", "high"])


def headings(final: pd.DataFrame) -> dict[str, str]:
    """Of each group: "nbsp (5 runs)", or "nbsp (4 of 5 runs)" where one is not finished."""
    texts = {}
    for group, finished in final.groupby("group", sort=False)["finished"]:
        done, all_runs = int(finished.sum()), len(finished)
        texts[group] = f"{group} ({'' if done == all_runs else f'{done} of '}{all_runs} run{'s' * (all_runs > 1)})"
    return texts


def markdown(table: pd.DataFrame, final: pd.DataFrame) -> str:
    """A line per metric, a column per group: `IQM [interval]`, and `(n = 2)` for few seeds or fewer than elsewhere."""
    heads, most = headings(final), table.groupby("group")["seeds"].max()
    lines = ["| metric | " + " | ".join(heads.values()) + " |", "|---" * (len(heads) + 1) + "|"]
    for metric, part in table.groupby("metric", sort=False):
        cells, rows = [], {row.group: row for row in part.itertuples()}
        for group in heads:
            row = rows.get(group)
            if row is None or not row.seeds:
                cells.append("n/a")
                continue
            shown = f" [{number(row.low)}, {number(row.high)}]" if row.seeds >= FEWEST else ""
            few = f" (n = {row.seeds})" if row.seeds < max(FEWEST, most[group]) else ""
            cells.append(number(row.iqm) + shown + few)
        tasks = part["tasks"].max()
        lines.append(f"| {metric}{f' ({tasks} tasks)' if tasks > 1 else ''} | " + " | ".join(cells) + " |")
    note = "Interquartile mean and 95 % stratified bootstrap interval over seeds"
    note += ", and over tasks where their number is given." if table["tasks"].max() > 1 else "."
    return "\n".join([*lines, "", note if len(table) else "No run is finished."])


def number(value: float) -> str:
    """Two decimals below 10, one below 100, none above; two significant digits below 0.01."""
    if value != 0 and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


# ---------------------------------------------------------------------------------------------------------- figure


def curves(part: pd.DataFrame, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and values (runs, T) of one group on one task.

    Runs need not be evaluated at the same steps (an episode ends where it ends): each is interpolated linearly at the
    steps of all of them, over the stretch that all of them cover.
    """
    runs = [run.groupby("global_step")[value].last().dropna() for _, run in part.groupby("run", sort=False)]
    runs = [run for run in runs if len(run)]
    if not runs:
        return np.empty(0), np.empty((0, 0))
    steps = np.unique(np.concatenate([run.index for run in runs]))
    steps = steps[(steps >= max(run.index[0] for run in runs)) & (steps <= min(run.index[-1] for run in runs))]
    return steps, np.stack([np.interp(steps, run.index, run.to_numpy()) for run in runs])


def mean_over_tasks(evaluations: pd.DataFrame, finished: set[str]) -> pd.DataFrame:
    """Mean success of each run over all its tasks at each evaluation, of each task the latest; 0 before its first.

    The tasks that an unfinished run will have are those of its group.
    """
    index = ["group", "run", "global_step"]
    table, means = evaluations.pivot_table(index=index, columns="label", values="success", aggfunc="last"), []
    for (group, name), run in table.groupby(["group", "run"]):
        own = (run if name in finished else table.loc[group]).notna().any()
        means.append(run.loc[:, own].ffill().fillna(0).mean(axis=1).rename("success"))
    return pd.concat(means).reset_index()


def align_phases(evaluations: pd.DataFrame, finished: set[str]) -> tuple[pd.DataFrame, bool]:
    """`global_step` in phases where runs ended them at different steps (a visit that stops when solved), and whether.

    The mean over seeds at one step would mix phases there. Every phase gets the width 1: its end, where there is always
    an evaluation, lies at a whole number. The phase that an unfinished run is in has no end yet: it is left out then.
    """
    ends = evaluations.groupby(["run", "phase"])["global_step"].max().unstack("phase")
    starts = ends.shift(axis=1, fill_value=0)
    for name in set(ends.index) - finished:
        ends.loc[name, ends.loc[name].last_valid_index()] = math.nan
    if ends.shape[1] == 1 or (ends.nunique() <= 1).all():
        return evaluations, False
    place = pd.MultiIndex.from_frame(evaluations[["run", "phase"]])
    start, end = starts.stack().reindex(place).to_numpy(), ends.stack().reindex(place).to_numpy()
    phases = evaluations["phase"] + (evaluations["global_step"] - start) / (end - start)
    return evaluations.assign(global_step=phases).dropna(subset="global_step"), True


def phase_borders(evaluations: pd.DataFrame) -> list[float]:
    """Steps at which a phase ended, the last phase of a run left out."""
    ends = evaluations.groupby(["run", "phase"])["global_step"].max()
    return sorted({end for _, run in ends.groupby("run") for end in run.iloc[:-1]})


def draw(evaluations: pd.DataFrame, final: pd.DataFrame, path: Path, reps: int) -> None:
    """Learning curves: a panel per task, a colour per group."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    finished, heads = set(final.loc[final["finished"], "run"]), headings(final)
    evaluations, by_phase = align_phases(evaluations, finished)
    measure, borders = measure_of(evaluations), phase_borders(evaluations)
    style = {
        group: {"color": COLOURS[i % len(COLOURS)], "linestyle": LINE_STYLES[i % len(LINE_STYLES)], "linewidth": 1.6}
        for i, group in enumerate(heads)
    }
    panels = list(evaluations.groupby("label", sort=False))
    if measure == "success" and evaluations.groupby("run")["label"].nunique().max() > 1:
        panels.insert(0, ("mean of all tasks", mean_over_tasks(evaluations, finished)))
    columns = min(PANELS_PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(9, 0.8 + {1: 3.6, 2: 2.9}.get(columns, 2.0) * rows), layout="constrained")
    axes, single_runs = figure.subplots(rows, columns, sharex=True, sharey=measure == "success", squeeze=False), False
    for axis, (label, panel) in zip(axes.flat, panels, strict=False):
        for group in heads:
            single_runs |= draw_group(axis, panel[panel["group"] == group], measure, finished, style[group], reps)
        for border in borders:
            axis.axvline(border, color="0.6", linewidth=0.6, zorder=0)
        axis.set_title(label.replace("$", r"\$"), fontsize=9)  # no formula
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        if not by_phase:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=by_phase))
        if measure == "success":
            axis.set_ylim(-0.04, 1.04)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    for axis in list(axes.flat)[max(0, len(panels) - columns) : len(panels)]:
        axis.tick_params(labelbottom=True)  # the last panel of each column
    meaning = "line: interquartile mean of the runs; band: its 95 % bootstrap interval"
    meaning += "; thin lines: single runs" if single_runs else ""
    figure.supxlabel(f"{'phases, each drawn with the same width' if by_phase else 'steps'}\n{meaning}", fontsize=8)
    figure.supylabel(measure.replace("_", " "), fontsize=9)
    handles = [Line2D([], [], label=text.replace("$", r"\$"), **style[group]) for group, text in heads.items()]
    longest = max(map(len, heads.values())) + 6  # the line sample is as wide as six letters
    ncols = min(4, len(handles), max(1, 110 // longest))
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def draw_group(axis, part: pd.DataFrame, measure: str, finished: set[str], style: dict, reps: int) -> bool:
    """One line for the finished runs of a group on a task, or for all if none is; a thin one for each other run, and
    for each run where there are few. Returns whether there are thin ones.
    """
    done = part[part["run"].isin(finished)]
    steps, values = curves(done if len(done) else part, measure)
    if len(steps):
        axis.plot(steps, iqm(values), **style)
        axis.fill_between(steps, *interval(values, reps), color=style["color"], alpha=0.18, linewidth=0)
    singles = [run for name, run in part.groupby("run") if name not in finished or len(values) < FEWEST]
    for run in singles:
        axis.plot(run["global_step"], run[measure], color=style["color"], linewidth=0.6, alpha=0.6)
    return bool(singles)


# ------------------------------------------------------------------------------------------------------------ main


def default_out(folders: Iterable[Path]) -> Path:
    """`plot` in the folder that holds all the runs. Raises ArgumentError if that is the checkout or above it."""
    folder = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    if ROOT.is_relative_to(folder):
        raise ArgumentError(f"--out: must be given where the runs have only {folder} in common")
    return folder / "plot"


def read(args: Args) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Evaluations and final values by script, from the folders or the csv files."""
    if bool(args.folders) == bool(args.from_results):
        raise ArgumentError("give either folders of runs or --from-results PATH")
    if args.from_results and args.group_by:
        raise ArgumentError("--group-by: needs the folders of the runs; what --csv wrote has its groups")
    if args.csv and not (args.folders or args.out):
        raise ArgumentError("--csv: needs --out PATH here")
    if args.from_results:
        frames = {"": read_results(args.from_results)}
    else:
        scripts, group_by = find_runs(args.folders), [name.replace("-", "_") for name in args.group_by]
        known = {name for runs in scripts.values() for one in runs for name in one["args"]}
        for name in set(group_by) - known:
            raise ArgumentError(f"--group-by {name}: no run has this argument; there are {', '.join(sorted(known))}")
        frames = {script: collect(script, runs, group_by or telling_apart(runs)) for script, runs in scripts.items()}
    if args.labels:
        groups = list(dict.fromkeys(group for _, final in frames.values() for group in final["group"]))
        if len(args.labels) != len(groups) or len(set(args.labels)) < len(groups):
            must = f"must be a name for each of the groups {'; '.join(groups)}"
            raise ArgumentError(f"--labels {' '.join(args.labels)}: {must}")
        for frame in (frame for pair in frames.values() for frame in pair):
            frame["group"] = frame["group"].map(dict(zip(groups, args.labels, strict=True)))
    return frames


def main(args: Args) -> str:
    """Print the table, write the files, return the table. Raises ArgumentError for what cannot be shown."""
    cli.check_types(args)
    frames = read(args)
    all_scores = {script: scores(*pair) for script, pair in frames.items()}
    known = {metric: None for part in all_scores.values() for metric in part["metric"]}
    for name in args.metrics:
        if name not in known and args.metrics != ("all",):
            raise ArgumentError(f"--metrics {name}: not here; there are {', '.join(known)}")
    out = args.out or (default_out(args.folders) if args.folders else None)
    texts = []
    for script, (_, final) in frames.items():
        table = aggregate(select(all_scores[script], args.metrics), args.reps)
        texts.append((f"## {script}\n\n" if len(frames) > 1 else "") + markdown(table, final))
    cli.say("\n\n".join(texts))  # also into `| head`
    if out:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{out}.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")  # with_suffix would cut beta=0.3
            for script, (evaluations, final) in frames.items():
                path = f"{out}_{script}" if len(frames) > 1 else str(out)
                draw(evaluations, final, Path(f"{path}.png"), args.reps)
                if args.csv:
                    evaluations.to_csv(f"{path}.csv", index=False)
                    final.to_csv(f"{path}_final.csv", index=False)
        except OSError as error:
            raise ArgumentError(f"--out {out}: {error}") from None
        cli.say(f"\nwritten beside {out}.md")
    return "\n\n".join(texts)


if __name__ == "__main__":
    cli.run(main, Args)
