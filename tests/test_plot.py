"""common/plot.py on run folders made up here, whose statistics are known."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rliable import metrics as rliable_metrics

from common import cli, plot
from common.cli import ArgumentError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
COLUMNS = ("global_step", "phase", "task_index", "task", "episodes", "episode_return", "success", "episode_length")


def make_run(folder, rows, seed=0, args=(), metrics=(), script="ssde", finished=True):
    """rows: (global_step, phase, task_index, task, episode_return, success) of each evaluation."""
    folder.mkdir(parents=True)
    stored = {"seed": seed, "run_dir": str(folder)} | dict(args)
    (folder / "config.json").write_text(json.dumps({"script": script, "format": 2, "args": stored}))
    with open(folder / "evaluations.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((*row[:4], 10, *row[4:], 200) for row in rows)
    results = {"script": script, "seed": seed, "global_step": 200, "wall_seconds": 2.0, "steps_per_second": 100.0}
    results |= {"tasks": [], "metrics": dict(metrics), "parameters": {"actor": 7}}
    if finished:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def two_task_run(folder, method, seed, final_reach, final_push, finished=True, **metrics):
    """A sequence reach, push; push is evaluated from its phase on."""
    rows = [
        (50, 0, 0, "reach", 10.0, 0.2),
        (100, 0, 0, "reach", 20.0, 1.0),
        (150, 1, 0, "reach", 30.0, 0.6),
        (150, 1, 1, "push", 30.0, 0.4),
        (200, 1, 0, "reach", 40.0, final_reach),
        (200, 1, 1, "push", 40.0, final_push),
    ]
    return make_run(
        folder, rows if finished else rows[:3], seed, {"method": method, "beta": 0.3}, metrics, "ssde", finished
    )


FINALS = {
    "ssde": [(1.0, 0.8), (0.9, 0.7), (0.8, 0.6), (0.1, 1.0)],
    "finetune": [(0.0, 0.9), (0.2, 0.8), (0.2, 0.8)],
}


@pytest.fixture
def sweep(tmp_path):
    """A folder with four runs of ssde and three of finetune."""
    for method, pairs in FINALS.items():
        for seed, final in enumerate(pairs):
            transfer = math.nan if seed else 0.5
            folder = tmp_path / "sweep" / f"{method}{seed}"
            two_task_run(folder, method, seed, *final, forgetting=0.1 * seed, transfer=transfer)
    return tmp_path / "sweep"


def frames_of(*folders, group_by=("method",)):
    [(script, runs)] = plot.find_runs(folders).items()
    return plot.collect(script, runs, group_by)


def table_of(*folders, reps=50, names=("all",), group_by=("method",)):
    return plot.aggregate(plot.select(plot.scores(*frames_of(*folders, group_by=group_by)), names), reps)


def run_main(*folders, **kwargs):
    return plot.main(plot.Args(folders=tuple(folders), **{"reps": 100} | kwargs))


def value_of(table, metric, group, column):
    return table.loc[(table["metric"] == metric) & (table["group"] == group), column].item()


# ------------------------------------------------------------------------------------------------------ statistics


def test_iqm_interval_and_counts_are_those_worked_out_by_hand(sweep):
    table = table_of(sweep, reps=500)
    # ssde's eight final successes sorted: .1 .6 | .7 .8 .8 .9 | 1 1; the middle half counts.
    assert value_of(table, "success per task", "ssde", "iqm") == pytest.approx((0.7 + 0.8 + 0.8 + 0.9) / 4)
    # finetune's six: 0 | .2 .2 .8 .8 | .9
    assert value_of(table, "success per task", "finetune", "iqm") == pytest.approx((0.2 + 0.2 + 0.8 + 0.8) / 4)
    assert value_of(table, "forgetting", "ssde", "iqm") == pytest.approx((0.1 + 0.2) / 2)
    assert value_of(table, "success per task", "ssde", "tasks") == 2
    assert value_of(table, "forgetting", "ssde", "tasks") == 1
    low, high = (value_of(table, "success per task", "ssde", column) for column in ("low", "high"))
    assert 0.1 <= low < 0.8 < high <= 1.0
    # Strata: reach and push of finetune are resampled apart, so every resample holds three values of each, and the
    # middle four hold two of each at most.
    low, high = (value_of(table, "success per task", "finetune", column) for column in ("low", "high"))
    assert (low, high) == pytest.approx(((0.0 + 0.0 + 0.8 + 0.8) / 4, (0.2 + 0.2 + 0.9 + 0.9) / 4), abs=0.051)
    pd.testing.assert_frame_equal(table, table_of(sweep, reps=500))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12))
def test_iqm_is_that_of_rliable(values):
    values = np.array(values)
    assert plot.iqm(values) == pytest.approx(rliable_metrics.aggregate_iqm(values.reshape(-1, 1)))
    assert plot.iqm(np.stack([values, -values], axis=1)) == pytest.approx([plot.iqm(values), plot.iqm(-values)])


def test_the_interval_is_that_of_the_iqm():
    # Three equal seeds: every resample is the same, its mean is 0.75 and its IQM 1.
    keys = [(seed, task) for seed in range(3) for task in range(4)]
    rows = [{"group": "a", "metric": "m", "seed": s, "task": t, "value": float(t > 0)} for s, t in keys]
    table = plot.aggregate(pd.DataFrame(rows), reps=20)
    assert table[["iqm", "low", "high"]].to_numpy().tolist() == [[1, 1, 1]]


def test_the_interval_at_each_step_is_over_seeds_and_covers_the_mean():
    values = np.random.default_rng(0).normal(size=(40, 3)) * [1, 2, 0] + [0, 5, 7]
    low, high = plot.interval(values, reps=500)
    # The standard deviation of an IQM of 40 normal values is about 1.1 / sqrt(40); 95 % are 2 * 1.96 of them.
    assert (high - low)[:2] == pytest.approx([0.68, 1.36], rel=0.35) and (low[2], high[2]) == (7, 7)
    assert (low <= plot.iqm(values)).all() and (plot.iqm(values) <= high).all()


def test_two_seeds_have_no_interval_but_their_number(tmp_path):
    for seed in range(2):
        two_task_run(tmp_path / str(seed), "ssde", seed, 0.5 + seed / 2, 0.5, forgetting=0.1)
    table = table_of(tmp_path)
    assert table[["low", "high"]].isna().all(axis=None)
    assert plot.markdown(table, frames_of(tmp_path)[1]).splitlines()[2] == (
        "| success per task (2 tasks) | 0.50 (n = 2) |"  # of .5 .5 | .5 1, sorted, the middle two
    )


def test_metrics_are_shown_in_the_order_asked_for(sweep):
    chosen = table_of(sweep, names=("transfer", "forgetting"))
    assert list(chosen["metric"]) == ["transfer", "transfer", "forgetting", "forgetting"]


def test_logged_metrics_are_shown_when_asked_for_only(tmp_path):
    rows, logged = [(200, 0, 0, "dmc/dog-run", 5.0, "")], {"mean_return": 4.0, "plasticity/actor/srank": 9}
    make_run(tmp_path / "a", rows, metrics=logged, script="mst_rigl")
    assert list(table_of(tmp_path, names=())["metric"]) == ["return, dmc/dog-run", "mean_return"]
    assert list(table_of(tmp_path, names=("all",))["metric"])[-1] == "plasticity/actor/srank"
    assert list(table_of(tmp_path, names=("plasticity/actor/srank",))["iqm"]) == [9]


def test_seeds_without_a_value_are_left_out_and_counted(sweep):
    table = table_of(sweep)
    assert value_of(table, "transfer", "ssde", "seeds") == 1
    assert value_of(table, "transfer", "ssde", "iqm") == 0.5
    assert math.isnan(value_of(table, "transfer", "ssde", "low"))
    lines = plot.markdown(table, frames_of(sweep)[1]).splitlines()
    assert lines[0] == "| metric | finetune (3 runs) | ssde (4 runs) |"
    assert lines[2].startswith("| success per task (2 tasks) | 0.50 [") and " | 0.80 [" in lines[2]
    assert lines[4] == "| transfer | 0.50 (n = 1) | 0.50 (n = 1) |"
    assert lines[-1].startswith("Interquartile mean and 95 % stratified bootstrap interval")


def test_a_metric_that_no_run_of_a_group_has_is_not_a_number(tmp_path):
    rows = [(100, 0, 0, "reach", 1.0, 0.5)]
    make_run(tmp_path / "a", rows, 0, {"method": "a"}, {"resets": 3, "transfer": math.nan})
    make_run(tmp_path / "b", rows, 0, {"method": "b"}, {"capacity": [1, 2], "note": "x", "flag": True})
    lines = run_main(tmp_path).splitlines()
    assert "| resets | 3.00 (n = 1) | n/a |" in lines and "| transfer | n/a | n/a |" in lines
    assert not any(word in line for line in lines for word in ("capacity", "note", "flag"))


def test_what_belongs_to_different_tasks_is_not_mixed(tmp_path):
    """Without success, each environment of a group is a run and a metric of its own."""
    for seed in range(3):
        for env, scale in (("Hopper-v5", 1000.0), ("Ant-v5", 10.0)):
            rows = [(step, 0, 0, env, scale * (seed + 1) * step / 200, "") for step in (100, 200)]
            args = {"env_id": env, "method": "ne"}
            make_run(tmp_path / f"{env}{seed}", rows, seed, args, {"mean_return": scale}, "ne")
    table = table_of(tmp_path)
    assert value_of(table, "return, Hopper-v5", "ne", "iqm") == pytest.approx(2000)
    assert value_of(table, "return, Ant-v5", "ne", "iqm") == pytest.approx(20)
    assert value_of(table, "mean_return, Hopper-v5", "ne", "iqm") == 1000
    assert set(table["tasks"]) == {1}
    args = {"env_id": "Ant-v5", "method": "td3"}
    make_run(tmp_path / "other", [(200, 0, 0, "Ant-v5", 50.0, "")], 0, args, {"mean_return": 2.0}, "ne")
    lines = run_main(tmp_path).splitlines()
    assert lines[0] == "| metric | ne (6 runs) | td3 (1 run) |"
    assert lines[2].startswith("| return, Ant-v5 | 20.0 [") and lines[2].endswith(" | 50.0 (n = 1) |")
    assert lines[3].startswith("| return, Hopper-v5 | 2,000 [") and lines[3].endswith(" | n/a |")


# ---------------------------------------------------------------------------------------------------------- groups


def test_groups_are_named_by_their_arguments(sweep):
    assert set(frames_of(sweep, group_by=("method", "beta"))[1]["group"]) == {"ssde, beta=0.3", "finetune, beta=0.3"}
    assert set(frames_of(sweep / "ssde0", group_by=())[1]["group"]) == {"ssde"}  # the script


def test_by_default_all_that_differs_tells_groups_apart(tmp_path):
    def runs(*several):
        return [
            {"args": dict(zip(("seed", "critic_lr", "preset", "width", "device"), v, strict=True))} for v in several
        ]

    # The seed and the device do not; the step size follows from the preset.
    several = (1, 3e-4, "mrq", 1.0, "cpu"), (2, 3e-4, "mrq", 1.0, "cuda"), (1, 1e-4, "mst", 1.0, "cpu")
    assert plot.telling_apart(runs(*several)) == ["preset"]
    assert plot.telling_apart(runs(*several, (1, 1e-4, "mst", 2.0, "cpu"))) == ["preset", "width"]
    assert plot.telling_apart(runs(*several[:2])) == []
    several = [{"args": {"seed": 1, "width": width, "method": method}} for width in (1, 2) for method in "ab"]
    assert plot.telling_apart(several) == ["method", "width"]  # a method, then what it is given
    assert plot.telling_apart([*several, {"args": {"seed": 1, "method": "a"}}]) == ["method", "width"]
    assert run_main(two_task_run(tmp_path / "a", "x", 0, 1, 1)).startswith("| metric | ssde (1 run) |")


def test_groups_can_be_given_names_in_their_order(sweep, tmp_path):
    printed = run_main(sweep, csv=True, out=tmp_path / "x", labels=("first", "second"))
    assert printed.startswith("| metric | first (3 runs) | second (4 runs) |")
    assert run_main(from_results=tmp_path / "x") == printed
    assert "| 1st (3 runs) | 2nd (4" in run_main(from_results=tmp_path / "x", labels=("1st", "2nd"))


def test_each_script_has_its_own_table_and_figure(sweep, tmp_path):
    args = {"steps_per_task": 7}  # which the other script does not have
    make_run(sweep / "z" / "deeper", [(200, 0, 0, "push", 1.0, 0.5)], 0, args, {"asr": 0.25}, "nbsp")
    printed = run_main(sweep, csv=True)
    ssde, nbsp = printed.split("## ssde\n\n")[1].split("## nbsp\n\n")
    assert "| asr | 0.25 (n = 1) |" in nbsp and "asr" not in ssde and "| finetune (3 runs) | ssde (4 runs) |" in ssde
    files = {path.name for path in sweep.glob("plot*")}
    assert files == {"plot.md"} | {f"plot_{s}{end}" for s in ("ssde", "nbsp") for end in (".png", ".csv", "_final.csv")}
    assert run_main(from_results=sweep / "plot_nbsp") + "\n" == nbsp + "\n"
    assert "| asr | 0.25" in run_main(sweep, metrics=("asr",), group_by=("steps-per-task", "method"))


def test_a_task_that_comes_twice_is_two_tasks(tmp_path):
    rows = [(100, 0, 0, "push", 1.0, 0.5), (200, 1, 0, "push", 1.0, 0.6), (200, 1, 1, "push", 1.0, 0.7)]
    evaluations, final = frames_of(make_run(tmp_path / "a", rows))
    assert list(evaluations["label"]) == ["0 push", "0 push", "1 push"] and list(final["tasks"]) == ["0 push + 1 push"]


def test_a_run_in_its_first_half_has_the_labels_of_those_whose_tasks_came_twice(tmp_path):
    rows = [(100, 0, 0, "push", 1.0, 0.5), (200, 1, 1, "reach", 1.0, 0.6), (300, 2, 2, "push", 1.0, 0.7)]
    done, begun = make_run(tmp_path / "a", rows), make_run(tmp_path / "b", rows[:2], 1, finished=False)
    evaluations, final = frames_of(begun, done)
    assert list(evaluations["label"]) == ["0 push", "1 reach", "0 push", "1 reach", "2 push"]
    assert list(final["tasks"]) == ["0 push + 1 reach", "0 push + 1 reach + 2 push"]
    means = plot.mean_over_tasks(evaluations, {str(done)})
    assert means.groupby("run")["success"].first().tolist() == pytest.approx([0.5 / 3, 0.5 / 3])


# ---------------------------------------------------------------------------------------------------------- curves


def test_curves_have_values_where_all_runs_have():
    part = pd.DataFrame(
        {"run": list("aaabb"), "global_step": [0, 100, 200, 50, 150], "success": [0.0, 1.0, 0.0, 0.2, 0.4]}
    )
    steps, values = plot.curves(part, "success")
    assert steps.tolist() == [50, 100, 150]
    assert values == pytest.approx(np.array([[0.5, 1.0, 0.5], [0.2, 0.3, 0.4]]))


def test_mean_over_tasks_counts_tasks_not_yet_seen_as_zero(sweep):
    two_task_run(sweep / "begun", "finetune", 7, 1, 1, finished=False)
    evaluations, final = frames_of(sweep / "finetune0", sweep / "begun")
    mean = plot.mean_over_tasks(evaluations, set(final.loc[final["finished"], "run"]))
    finished, begun = ({50: 0.1, 100: 0.5, 150: 0.5, 200: 0.45}, {50: 0.1, 100: 0.5, 150: 0.3})
    for folder, values in (("finetune0", finished), ("begun", begun)):
        part = mean[mean["run"] == str(sweep / folder)]
        assert dict(zip(part["global_step"], part["success"], strict=True)) == pytest.approx(values)
    assert plot.phase_borders(evaluations) == [100]


def phased_run(folder, seed, ends, finished=True):
    steps = [(ends[0] // 2, 0), (ends[0], 0), ((ends[0] + ends[1]) // 2, 1), (ends[1], 1)]
    return make_run(folder, [(step, phase, 0, "reach", 1.0, 0.5) for step, phase in steps], seed, finished=finished)


def test_phases_that_end_at_different_steps_are_drawn_with_the_same_width(tmp_path):
    """One run ends its first phase at step 40 of 140, the other at step 100 of 160."""
    runs = [phased_run(tmp_path / str(seed), seed, ends) for seed, ends in enumerate([(40, 140), (100, 160)])]
    evaluations, final = frames_of(*runs)
    aligned, by_phase = plot.align_phases(evaluations, set(final["run"]))
    assert by_phase and aligned["global_step"].tolist() == [0.5, 1, 1.5, 2] * 2
    assert plot.phase_borders(aligned) == [1]
    # While the second is not finished, its second phase has no end yet.
    aligned, by_phase = plot.align_phases(evaluations, {str(runs[0])})
    assert by_phase and aligned["global_step"].tolist() == [0.5, 1, 1.5, 2, 0.5, 1]
    alone = evaluations[evaluations["seed"] == 0]
    same, by_phase = plot.align_phases(alone, set(final["run"]))
    assert same is alone and not by_phase


def test_a_run_underway_and_one_of_another_length_keep_their_steps(tmp_path):
    runs = [phased_run(tmp_path / "a", 0, (100, 200)), phased_run(tmp_path / "b", 1, (100, 180), finished=False)]
    evaluations, _ = frames_of(*runs)
    assert plot.align_phases(evaluations, {str(runs[0])}) == (evaluations, False)
    lengths = evaluations.assign(phase=0)  # one phase: shorter and longer runs
    assert plot.align_phases(lengths, set(lengths["run"])) == (lengths, False)


class Axis:
    """Keeps what is drawn."""

    def __init__(self):
        self.lines, self.band = [], None

    def plot(self, steps, values, linewidth, **_):
        self.lines.append((linewidth, list(steps), pytest.approx(list(values))))

    def fill_between(self, steps, low, high, **_):
        self.band = None if np.isnan(low).all() else (list(steps), list(low), list(high))


def drawn(part, finished):
    axis, part = Axis(), pd.DataFrame(part, columns=["run", "global_step", "success"])
    plot.draw_group(axis, part, "success", finished, {"color": "red", "linewidth": 2}, reps=20)
    return axis


def test_finished_runs_are_a_line_with_a_band_and_others_thin_lines():
    rows = [(name, step, value) for name, value in zip("abcd", (0.1, 0.2, 0.9, 1.0), strict=True) for step in (10, 20)]
    rows = [row for row in rows if row[:2] != ("d", 20)]
    axis = drawn(rows, set("abc"))
    assert axis.lines == [(2, [10, 20], [0.4, 0.4]), (0.6, [10], [1.0])]
    assert axis.band[0] == [10, 20] and axis.band[1] <= [0.4, 0.4] <= axis.band[2]
    axis = drawn(rows, set("ab"))  # two: no band, each drawn
    assert axis.band is None and len(axis.lines) == 5 and axis.lines[0] == (2, [10, 20], [0.15, 0.15])
    axis = drawn(rows, set())  # none is finished: a line over all
    assert axis.lines[0] == (2, [10], [0.55]) and len(axis.lines) == 5 and axis.band[0] == [10]
    assert drawn([], set()).lines == []


def test_a_panel_has_a_line_for_each_group_of_its_own_runs(sweep, tmp_path, monkeypatch):
    drawn = []

    def draw_group(axis, part, *_):
        drawn.append(set(part["group"]) | set(part.get("label", ["mean"])))
        return False

    monkeypatch.setattr(plot, "draw_group", draw_group)
    plot.draw(*frames_of(sweep), tmp_path / "x.png", 10)
    assert drawn == [{group, label} for label in ("mean", "reach", "push") for group in ("finetune", "ssde")]


def test_a_task_that_is_not_evaluated_each_time_counts_with_its_latest(tmp_path):
    rows = [(100, 0, 0, "reach", 1.0, 0.8), (150, 1, 1, "push", 1.0, 0.4), (200, 1, 0, "reach", 1.0, 0.2)]
    evaluations, final = frames_of(make_run(tmp_path / "a", rows))
    means = plot.mean_over_tasks(evaluations, set(final["run"]))
    assert means["success"].tolist() == pytest.approx([0.4, 0.6, 0.3])


# ----------------------------------------------------------------------------------------------------------- files


def test_unfinished_runs_are_drawn_and_counted(sweep):
    finished = run_main(sweep)
    begun = two_task_run(sweep / "ssde_begun", "ssde", 9, 1, 1, finished=False)
    (sweep / "ssde_new").mkdir()
    (sweep / "ssde_new" / "config.json").write_text((begun / "config.json").read_text())  # no evaluation yet
    printed = run_main(sweep)
    assert printed.splitlines()[0] == "| metric | finetune (3 runs) | ssde (4 of 6 runs) |"
    assert printed.splitlines()[1:] == finished.splitlines()[1:]
    printed = run_main(begun)
    assert printed.splitlines()[0] == "| metric | ssde (0 of 1 run) |" and printed.endswith("No run is finished.")
    assert (begun / "plot.png").is_file()


def test_the_figure_names_thin_lines_where_there_are_any(sweep, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    run_main(sweep)
    two_task_run(sweep / "begun", "ssde", 9, 1, 1, finished=False)
    run_main(sweep)
    assert ["thin lines: single runs" in figure.get_supxlabel() for figure in figures] == [False, True]


def test_files_are_written_beside_the_runs_and_suffice_to_redraw(sweep, tmp_path):
    two_task_run(sweep / "begun", "ssde", 9, 1, 1, finished=False)
    before = {path.relative_to(sweep) for path in sweep.rglob("*")}
    printed = run_main(sweep, csv=True)
    files = {path.relative_to(sweep) for path in sweep.rglob("*")} - before
    assert sorted(map(str, files)) == ["plot.csv", "plot.md", "plot.png", "plot_final.csv"]
    assert (sweep / "plot.md").read_text() == printed + "\n"
    evaluations, final = pd.read_csv(sweep / "plot.csv"), pd.read_csv(sweep / "plot_final.csv")
    assert set(COLUMNS) | {"group", "seed", "run"} <= set(evaluations.columns) and len(evaluations) == 7 * 6 + 3
    assert list(final.columns[:9]) == plot.RUN_COLUMNS
    ssde = final[(final["group"] == "ssde") & final["finished"]]
    assert list(ssde["forgetting"]) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert run_main(from_results=sweep / "plot", out=tmp_path / "beta=0.3") == printed
    assert sorted(path.name for path in tmp_path.glob("beta*")) == ["beta=0.3.md", "beta=0.3.png"]
    assert (tmp_path / "beta=0.3.png").read_bytes() == (sweep / "plot.png").read_bytes()


def test_nothing_is_written_into_the_checkout_unless_told(sweep):
    assert plot.default_out([sweep]) == sweep / "plot"
    assert plot.default_out([sweep / "ssde0", sweep / "ssde1"]) == sweep / "plot"
    assert plot.default_out([ROOT / "runs" / "a", ROOT / "runs" / "b"]) == ROOT / "runs" / "plot"
    for folders in ([ROOT], [ROOT / "sweeps", ROOT / "runs"], [sweep, ROOT / "runs"]):
        with pytest.raises(ArgumentError, match="--out: must be given"):
            plot.default_out(folders)


@pytest.mark.parametrize("name", ["ssde_three_tasks", "nbsp_methods", "gmp_quick", "ne_halfcheetah", "mst_cartpole"])
def test_the_results_that_are_here_can_be_drawn(name, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    printed = run_main(from_results=RESULTS / name, reps=2)
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
    final = pd.read_csv(RESULTS / f"{name}_final.csv")
    counts = {group: len(part) for group, part in final.groupby("group", sort=False)}
    heads = [f"{group} ({n} run{'s' * (n > 1)})" for group, n in counts.items()]
    assert printed.splitlines()[0] == f"| metric | {' | '.join(heads)} |"
    if name == "nbsp_methods":  # the one whose phases end at different steps
        run_main(from_results=RESULTS / name, reps=2, out=tmp_path / "new" / name)
        assert (tmp_path / "new" / f"{name}.png").stat().st_size > 10_000


def test_what_cannot_be_shown_is_an_error(sweep, tmp_path):
    empty, damaged, foreign = tmp_path / "empty", tmp_path / "damaged", tmp_path / "foreign"
    many, listed, unseeded = tmp_path / "many", tmp_path / "listed", tmp_path / "unseeded"
    texts = {empty: None, damaged: "{", foreign: '{"model": "bert"}', many: "[1, 2]"}
    texts |= {listed: '{"script": "x", "args": []}', unseeded: '{"script": "x", "args": {"lr": 1}}'}
    for folder, text in texts.items():
        folder.mkdir()
        if text:
            (folder / "config.json").write_text(text)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text((sweep / "ssde0" / "config.json").read_text())
    again = two_task_run(tmp_path / "again", "ssde", 0, 0.5, 0.5)
    for name in ("table", "table_final"):
        (tmp_path / f"{name}.csv").write_text("a,b\n1,2\n")
    (tmp_path / "taken.md").mkdir()
    cases = [
        ({"folders": (sweep, again)}, "both seed 0 of group 'ssde' on reach"),
        ({"folders": (sweep,), "group_by": ("beta",)}, "both seed 0 of group 'beta=0.3'"),  # methods thrown together
        ({"folders": (sweep,), "group_by": ("metod",)}, "--group-by metod: no run has this argument; there are beta"),
        ({"folders": (sweep, empty)}, "empty: holds no run"),
        ({"folders": (sweep, tmp_path / "nowhere")}, "nowhere: holds no run"),
        ({"folders": (damaged,)}, "damaged: no readable run .JSONDecodeError"),
        ({"folders": (foreign,)}, "foreign: no readable run .KeyError"),
        ({"folders": (many,)}, "many: no readable run .ValueError: no object"),
        ({"folders": (listed,)}, "listed: no readable run .TypeError"),
        ({"folders": (unseeded,)}, "unseeded: no readable run .KeyError: 'seed'"),
        ({"folders": (sweep,), "out": tmp_path / "taken"}, "--out .*taken.*directory"),
        ({"from_results": tmp_path / "table"}, "table.csv is not what --csv wrote .KeyError: 'group'"),
        ({"folders": (sweep,), "out": damaged / "config.json" / "x"}, "--out .*config.json"),
        ({"from_results": tmp_path / "nowhere", "group_by": ("beta",)}, "--group-by: needs the folders"),
        ({"from_results": tmp_path / "nowhere", "csv": True, "out": None}, "--csv: needs --out"),
        ({"folders": (tmp_path / "new",)}, "new: no evaluation yet"),
        ({"folders": (sweep,), "metrics": ("nothing",)}, "--metrics nothing: not here; there are success per task"),
        ({"folders": (sweep,), "labels": ("one",)}, "--labels one: .*finetune; ssde"),
        ({"folders": (sweep,), "labels": ("one", "one")}, "--labels one one"),
        ({"folders": (sweep,), "reps": 0}, "--reps 0: must be at least 1"),
        ({"from_results": tmp_path / "nowhere"}, "nowhere.csv is missing"),
        ({"folders": (sweep,), "from_results": tmp_path / "x"}, "give either"),
        ({}, "give either"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ArgumentError, match=message):
            plot.main(plot.Args(**{"out": tmp_path / "out"} | kwargs))
    assert not list(tmp_path.glob("out*"))


def test_a_folder_of_links_to_runs_is_a_folder_of_runs(sweep, tmp_path):
    (tmp_path / "links").mkdir()
    for name in ("ssde0", "ssde1"):
        (tmp_path / "links" / name).symlink_to(sweep / name)
    assert len(plot.find_runs([tmp_path / "links"])["ssde"]) == 2
    assert len(plot.find_runs([tmp_path / "links", sweep])["ssde"]) == 7


def test_a_name_is_no_formula(sweep, tmp_path):
    run_main(sweep, labels=(r"$\foo$", "$x_^$ y"), out=tmp_path / "x")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_folder_given_twice_counts_once(sweep):
    assert len(plot.find_runs([sweep, sweep / "ssde0", sweep])["ssde"]) == 7


def test_the_command(sweep, tmp_path, monkeypatch, capsys):
    line = [sys.executable, "-m", "common.plot", str(sweep), "--metrics", "forgetting", "--reps", "10"]
    done = subprocess.run([*line, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("| metric | finetune (3 runs) | ssde (4 runs) |") and "out.md" in done.stdout
    monkeypatch.setattr(sys, "argv", ["plot", "--from-results", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        cli.run(plot.main, plot.Args)
    message = capsys.readouterr().err
    assert message.startswith("error: --from-results nowhere: ") and message.count("\n") == 1
