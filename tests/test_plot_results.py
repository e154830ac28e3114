"""tests/benchmarks/plot_results.py on run folders made up here, whose statistics are known."""

import csv
import importlib.util
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "plot_results.py"
spec = importlib.util.spec_from_file_location("plot_results", SCRIPT)
plot_results = importlib.util.module_from_spec(spec)
sys.modules["plot_results"] = plot_results  # dataclasses look their module up
spec.loader.exec_module(plot_results)

COLUMNS = ("global_step", "phase", "task_index", "task", "episodes", "episode_return", "success", "episode_length")


def make_run(folder, rows, seed=0, args=(), metrics=(), script="ssde"):
    """rows: (global_step, phase, task_index, task, episode_return, success) of each evaluation."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"args": dict(args), "versions": {}, "git_commit": None}))
    with open(folder / "evaluations.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((*row[:4], 10, *row[4:], 200) for row in rows)
    results = {"script": script, "seed": seed, "global_step": 200, "wall_seconds": 2.0, "steps_per_second": 100.0}
    results |= {"tasks": [], "metrics": dict(metrics), "parameters": {"actor": 7}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def two_task_run(folder, method, seed, final_reach, final_push, **metrics):
    """A sequence reach, push; push is evaluated from its phase on."""
    rows = [
        (50, 0, 0, "reach", 10.0, 0.2),
        (100, 0, 0, "reach", 20.0, 1.0),
        (150, 1, 0, "reach", 30.0, 0.6),
        (150, 1, 1, "push", 30.0, 0.4),
        (200, 1, 0, "reach", 40.0, final_reach),
        (200, 1, 1, "push", 40.0, final_push),
    ]
    return make_run(folder, rows, seed, {"method": method, "beta": 0.3}, metrics)


@pytest.fixture
def two_groups(tmp_path):
    finals = {"ssde": [(1.0, 0.8), (0.9, 0.7), (0.8, 0.6), (0.1, 1.0)], "finetune": [(0.0, 0.9), (0.2, 0.8)]}
    return [
        two_task_run(
            tmp_path / f"{method}{seed}",
            method,
            seed,
            *final,
            forgetting=0.1 * seed,
            transfer=math.nan if seed else 0.5,
        )
        for method, pairs in finals.items()
        for seed, final in enumerate(pairs)
    ]


def run_main(tmp_path, **kwargs):
    return plot_results.main(plot_results.Args(reps=200, results_dir=tmp_path / "results", **kwargs))


def value_of(table, metric, group, column):
    return table.loc[(table["metric"] == metric) & (table["group"] == group), column].item()


def test_iqm_interval_and_counts_are_those_worked_out_by_hand(two_groups):
    table = plot_results.aggregate(plot_results.scores(*plot_results.collect(two_groups, ("method",))), reps=500)
    # ssde's eight final successes sorted: .1 .6 | .7 .8 .8 .9 | 1 1; the middle half counts.
    assert value_of(table, "success per task", "ssde", "iqm") == pytest.approx((0.7 + 0.8 + 0.8 + 0.9) / 4)
    assert value_of(table, "success per task", "finetune", "iqm") == pytest.approx((0.2 + 0.8) / 2)
    assert value_of(table, "forgetting", "ssde", "iqm") == pytest.approx((0.1 + 0.2) / 2)
    assert value_of(table, "success per task", "ssde", "tasks") == 2
    assert value_of(table, "forgetting", "ssde", "tasks") == 1
    low, high = (value_of(table, "success per task", "ssde", column) for column in ("low", "high"))
    assert 0.1 <= low < 0.8 < high <= 1.0
    # Strata: reach and push of finetune are resampled apart, so every resample holds two values of each.
    assert value_of(table, "success per task", "finetune", "low") == pytest.approx((0.0 + 0.8) / 2)
    assert value_of(table, "success per task", "finetune", "high") == pytest.approx((0.2 + 0.9) / 2)
    again = plot_results.aggregate(plot_results.scores(*plot_results.collect(two_groups, ("method",))), reps=500)
    pd.testing.assert_frame_equal(table, again)


def test_the_interval_is_that_of_the_iqm():
    # Two equal seeds: every resample is the same, its mean is 0.75 and its IQM 1.
    rows = [
        {"group": "a", "metric": "m", "seed": s, "task": t, "value": float(t > 0)} for s in (0, 1) for t in range(4)
    ]
    table = plot_results.aggregate(pd.DataFrame(rows), reps=20)
    assert table[["iqm", "low", "high"]].to_numpy().tolist() == [[1, 1, 1]]


def test_metrics_are_shown_in_the_order_asked_for(two_groups):
    table = plot_results.aggregate(plot_results.scores(*plot_results.collect(two_groups, ("method",))), reps=10)
    chosen = plot_results.select(table, ("transfer", "forgetting"))
    assert list(chosen["metric"]) == ["transfer", "transfer", "forgetting", "forgetting"]


def test_seeds_without_a_value_are_left_out_and_counted(two_groups):
    table = plot_results.aggregate(plot_results.scores(*plot_results.collect(two_groups, ("method",))), reps=50)
    assert value_of(table, "transfer", "ssde", "seeds") == 1
    assert value_of(table, "transfer", "ssde", "iqm") == 0.5
    assert math.isnan(value_of(table, "transfer", "ssde", "low"))
    lines = plot_results.markdown(table).splitlines()
    assert lines[0] == "| metric | ssde (4 seeds) | finetune (2 seeds) |"
    assert lines[2].startswith("| success per task (2 tasks) | 0.80 [")
    assert lines[4] == "| transfer | 0.50 (1 seed) | 0.50 (1 seed) |"
    assert lines[-1].startswith("Interquartile mean and 95 % stratified bootstrap interval")


def test_a_metric_that_no_run_of_a_group_has_is_not_a_number(tmp_path):
    rows = [(100, 0, 0, "reach", 1.0, 0.5)]
    runs = [
        make_run(tmp_path / "a", rows, 0, {"method": "a"}, {"resets": 3, "transfer": math.nan}),
        make_run(tmp_path / "b", rows, 0, {"method": "b"}, {"capacity": [1, 2], "note": "x", "flag": True}),
    ]
    lines = run_main(tmp_path, runs=tuple(runs), name="x", group_by=("method",)).splitlines()
    assert "| resets | 3.00 | n/a |" in lines and "| transfer | n/a | n/a |" in lines
    assert not any(word in line for line in lines for word in ("capacity", "note", "flag"))


def test_files_are_written_and_suffice_to_redraw(two_groups, tmp_path):
    printed = run_main(tmp_path, runs=tuple(two_groups), name="demo", group_by=("method",))
    results = tmp_path / "results"
    assert sorted(path.name for path in results.iterdir()) == ["demo.csv", "demo.png", "demo_final.csv"]
    evaluations = pd.read_csv(results / "demo.csv")
    assert set(COLUMNS) | {"group", "seed"} <= set(evaluations.columns) and len(evaluations) == 6 * 6
    final = pd.read_csv(results / "demo_final.csv")
    assert len(final) == 6 and list(final["forgetting"][:4]) == pytest.approx([0, 0.1, 0.2, 0.3])
    picture = (results / "demo.png").read_bytes()
    (results / "demo.png").unlink()
    csv_times = [path.stat().st_mtime_ns for path in sorted(results.glob("*.csv"))]
    assert run_main(tmp_path, from_results="demo") == printed
    assert (results / "demo.png").read_bytes() == picture
    assert [path.stat().st_mtime_ns for path in sorted(results.glob("*.csv"))] == csv_times  # left alone


def test_returns_of_different_tasks_are_not_mixed(tmp_path):
    """Without success, each environment of a group is a run and a metric of its own."""
    runs = []
    for seed in range(3):
        for env, scale in (("Hopper-v5", 1000.0), ("Ant-v5", 10.0)):
            rows = [(step, 0, 0, env, scale * (seed + 1) * step / 200, "") for step in (100, 200)]
            runs.append(make_run(tmp_path / f"{env}{seed}", rows, seed, metrics={"density": 1.0}, script="ne"))
    table = plot_results.aggregate(plot_results.scores(*plot_results.collect(tuple(runs), ())), reps=50)
    assert value_of(table, "return, Hopper-v5", "ne", "iqm") == pytest.approx(2000)
    assert value_of(table, "return, Ant-v5", "ne", "iqm") == pytest.approx(20)
    assert value_of(table, "density", "ne", "tasks") == 2
    rows = [(200, 0, 0, "Ant-v5", 50.0, "")]
    runs.append(make_run(tmp_path / "other", rows, metrics={"density": 0.2}, script="td3"))
    lines = run_main(tmp_path, runs=tuple(runs), name="ne").splitlines()
    assert lines[0] == "| metric | ne (3 seeds) | td3 (1 seed) |"
    assert lines[2].startswith("| return, Hopper-v5 | 2,000 [") and lines[2].endswith(" | n/a |")
    assert lines[3].startswith("| return, Ant-v5 | 20.0 [") and lines[3].endswith(" | 50.0 |")


def test_groups_are_named_by_their_arguments(two_groups):
    assert plot_results.read_run(two_groups[0], ())[1]["group"] == "ssde"  # the script
    assert plot_results.read_run(two_groups[4], ("method", "beta"))[1]["group"] == "finetune, beta=0.3"


def test_groups_can_be_given_names_in_their_order(two_groups, tmp_path):
    printed = run_main(tmp_path, runs=tuple(two_groups), name="x", group_by=("method",), labels=("first", "second"))
    assert printed.startswith("| metric | first (4 seeds) | second (2 seeds) |")
    assert run_main(tmp_path, from_results="x") == printed
    assert "| 1st (4 seeds) | 2nd (2" in run_main(tmp_path, from_results="x", labels=("1st", "2nd"))


def test_a_task_that_comes_twice_is_two_tasks(tmp_path):
    rows = [(100, 0, 0, "push", 1.0, 0.5), (200, 1, 0, "push", 1.0, 0.6), (200, 1, 1, "push", 1.0, 0.7)]
    evaluations, run = plot_results.read_run(make_run(tmp_path / "a", rows), ())
    assert list(evaluations["label"]) == ["0 push", "0 push", "1 push"] and run["tasks"] == "0 push + 1 push"


def test_curves_are_means_where_all_seeds_have_values():
    part = pd.DataFrame(
        {"seed": [0, 0, 0, 1, 1], "global_step": [0, 100, 200, 50, 150], "success": [0.0, 1.0, 0.0, 0.2, 0.4]}
    )
    steps, values = plot_results.curves(part, "success")
    assert steps.tolist() == [50, 100, 150]
    assert values == pytest.approx(np.array([[0.5, 1.0, 0.5], [0.2, 0.3, 0.4]]))


def test_mean_over_tasks_counts_tasks_not_yet_seen_as_zero(two_groups):
    evaluations, _ = plot_results.collect(two_groups[:1], ("method",))
    mean = plot_results.mean_over_tasks(evaluations)
    assert dict(zip(mean["global_step"], mean["success"], strict=True)) == pytest.approx(
        {50: 0.1, 100: 0.5, 150: 0.5, 200: 0.9}
    )
    assert plot_results.phase_borders(evaluations) == [100]


def test_phases_that_end_at_different_steps_are_drawn_with_the_same_width(tmp_path):
    """One run ends its first phase at step 40 of 140, the other at step 100 of 160."""
    runs = []
    for seed, ends in enumerate([(40, 140), (100, 160)]):
        steps = [(ends[0] // 2, 0), (ends[0], 0), ((ends[0] + ends[1]) // 2, 1), (ends[1], 1)]
        rows = [(step, phase, 0, "reach", 1.0, 0.5) for step, phase in steps]
        runs.append(make_run(tmp_path / str(seed), rows, seed))
    evaluations, _ = plot_results.collect(tuple(runs), ())
    aligned, by_phase = plot_results.align_phases(evaluations)
    assert by_phase and aligned["global_step"].tolist() == [0.5, 1, 1.5, 2] * 2
    assert plot_results.phase_borders(aligned) == [1]
    alone = evaluations[evaluations["seed"] == 0]
    same, by_phase = plot_results.align_phases(alone)
    assert same is alone and not by_phase


def test_what_cannot_be_shown_is_an_error(two_groups, tmp_path):
    runs = tuple(two_groups)
    unfinished = two_task_run(tmp_path / "unfinished", "ssde", 9, 0.5, 0.5)
    (unfinished / "results.json").unlink()
    cases = [
        ({"runs": runs, "name": "x"}, "both seed 0 of group 'ssde'"),  # ssde and finetune thrown together
        ({"runs": runs, "name": "x", "group_by": ("metod",)}, "no such argument"),
        ({"runs": (*runs, unfinished), "name": "x", "group_by": ("method",)}, "results.json is missing"),
        ({"runs": runs, "name": "x", "group_by": ("method",), "metrics": ("nothing",)}, "--metrics nothing"),
        ({"runs": runs, "name": "x", "group_by": ("method",), "labels": ("one",)}, "--labels one: .*ssde; finetune"),
        ({"runs": runs, "name": "x", "group_by": ("method",), "labels": ("one", "one")}, "--labels one one"),
        ({"from_results": "nowhere"}, "nowhere.csv is missing"),
        ({"runs": runs}, "give either"),
        ({}, "give either"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            run_main(tmp_path, **kwargs)
    assert not (tmp_path / "results").exists()


def test_the_command_reports_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--from-results", "nowhere", "--results-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("error: --from-results nowhere: ") and message.count("\n") == 1
