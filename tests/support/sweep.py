"""Sweeps: long tests whose law a shorter test holds in every run. `make test` plays a twelfth of them, another each time; `make test-all`
plays all. What is listed here is a beginning of test names; the law it widens stands behind it.
"""

import hashlib

import pytest

PARTS = 12
SWEEPS: tuple[str, ...] = (
    # the law in every run: a damaged cache is emptied and compiled anew
    "tests/lumina_fn/disk/test_compile_cache.py::test_a_library_that_would_crash_is_not_loaded",
    "tests/lumina_fn/disk/test_compile_cache.py::test_a_place_that_is_a_file_keeps_nothing_and_stops_nothing",
    # seven steps and thirteen are twenty [off]; all ranks stop after the same step [2]
    "tests/experiments/finetuning/test_resume.py::test_four_processes_then_two_then_three_then_one",
    "tests/experiments/finetuning/test_resume.py::test_a_killed_rank_is_started_again_and_nothing_is_lost",
    "tests/experiments/finetuning/test_resume.py::test_seven_steps_and_thirteen_are_twenty[blocks]",
    "tests/experiments/finetuning/test_resume.py::test_all_ranks_stop_after_the_same_step[15]",
    "tests/experiments/finetuning/test_soak.py",
    # every op is measured and counted, uncompiled
    "tests/kernels/test_bench.py::test_every_op_compiles",
    "tests/kernels/test_bench.py::test_compiled_takes_its_turns",
    # two processes equal one: every strategy uncompiled; compiled, two ranks do what one process does (test_launch)
    "tests/lumina_fn/test_sharding.py::test_every_strategy_equals_one_process",
    "tests/lumina_fn/test_sharding.py::test_the_whole_step_compiled_equals_one_process",
    # one mesh restores what another saved
    "tests/lumina_fn/state/test_saved_state.py::test_any_mesh_restores_what_any_other_saved",
    # predicted memory: the other rows of the same tables
    "tests/lumina_fn/costs/test_footprint.py::test_what_is_predicted_lives_in_a_real_step[2]",
    "tests/lumina_fn/costs/test_footprint.py::test_the_predicted_peak_is_within_15_percent_of_what_a_process_takes[0]",
    "tests/lumina_fn/costs/test_footprint.py::test_the_predicted_peak_is_within_15_percent_of_what_a_process_takes[1]",
    "tests/lumina_fn/costs/test_footprint.py::test_the_predicted_peak_is_within_15_percent_of_what_a_process_takes[4]",
    "tests/lumina_fn/costs/test_footprint.py::test_a_block_keeps_what_the_real_pair_keeps[True-",
    "tests/experiments/planning/test_memory.py::test_what_is_predicted_is_what_a_run_takes_and_what_is_free_is_below_the_limit",
    # compiled steps equal eager ones [blocks-False]
    "tests/lumina_fn/test_train.py::test_compiled_steps_equal_eager_ones[step-",
    "tests/lumina_fn/test_train.py::test_compiled_steps_equal_eager_ones[blocks-True]",
    "tests/lumina_fn/test_train.py::test_the_rate_may_be_any_python_function_of_the_step[step]",
    "tests/lumina_fn/test_train.py::test_what_remat_computes_again_is_not_merged_by_the_compiler[False]",
    "tests/experiments/finetuning/test_feature_folders.py::test_packed_rows_are_compiled",
    "tests/experiments/finetuning/test_finetune.py::test_same_seed_same_model[['--compile', 'blocks']]",
    # two ranks do what one process does; Ctrl-C, and a killed rank [off], end all; the script for one machine
    "tests/experiments/launching/test_launch.py::test_a_run_that_is_started_again_finishes",
    "tests/experiments/launching/test_launch.py::test_a_host_that_is_cut_away_ends_all",
    "tests/experiments/launching/test_launch.py::test_two_hosts_do_what_one_does",
    "tests/experiments/launching/test_launch.py::test_killing_a_rank_ends_all[blocks]",
    "tests/experiments/launching/test_launch.py::test_killing_the_launcher_ends_all",
    "tests/experiments/launching/test_launch.py::test_starting_again_does_not_overwrite_what_was_there_before",
    "tests/experiments/launching/test_launch.py::test_scripts_for_one_launcher[ascend_slurm.sh]",
    "tests/experiments/launching/test_guard.py::test_ranks_that_torchrun_did_not_start_outlive_who_did",
    "tests/experiments/launching/test_launch_safety.py::test_nothing_in_torchruns_store_disturbs_a_run",
    "tests/experiments/launching/test_guard.py::test_ranks_that_save_once_they_are_asked_to_stop_are_left_alone",
    *(
        f"tests/experiments/launching/test_guard.py::test_a_stopped_process_does_not_outlive_its_run[{case}]"
        for case in ("0-1", "1-0", "0-L1", "1-L0", "L0-1", "01-L", "L-01")
    ),
    # the command in the tests' own process; README's and the wheel's blocks run it as a program
    "tests/experiments/finetuning/test_finetune.py::test_as_a_program",
    # the plan's other tables on the same page
    "tests/experiments/planning/test_plan.py::test_the_roofline_on_the_page_is_what_is_printed_and_what_plan_says",
    # the same without an exchange
    "tests/lumina_fn/disk/test_disk.py::test_a_kill_at_a_random_moment_leaves_one_of_them_whole[True]",
    "tests/lumina_fn/costs/test_footprint.py::test_the_predicted_peak_is_within_15_percent_of_what_a_process_takes[3]",
    # compiled pairs of the other ops; rms_norm, attention and linear_cross_entropy in every run
    *(
        f"tests/lumina_fn/test_custom_backward.py::test_gradients_are_what_the_backward_says[{op}-compiled pair]"
        for op in ("qk_norm_rotary", "swiglu", "add_rms_norm", "packed_attention")
    ),
    "tests/bench/test_bench.py::test_sides_that_compute_something_else_are_not_timed",
    # a full disk ends finetune with one line [before]
    "tests/lumina_fn/state/test_damage.py::test_a_full_disk_ends_finetune_with_one_line[meanwhile]",
    "tests/bench/test_bench.py::test_our_side_of_the_language_rows_is_the_gradient_of_the_loss",
    # the same with a list and with tars; Parquet's rows are those of a range wherever it begins (test_archives)
    "tests/experiments/pretokenizing/test_pretokenize.py::test_any_number_of_processes_killed_or_not_makes_the_same_set[parquet",
    # a rank's place by every launcher's variables; a run under PyTorchJob's in a container, and Slurm's on two hosts
    "tests/experiments/launching/test_launchers.py::test_all_launchers_make_the_same_run",
    # the wheel installs and answers; without flags of a strategy; torchrun listens on the loopback alone
    "tests/test_dockerfile.py::test_what_is_copied_installs_and_answers",
    "tests/experiments/launching/test_launch.py::test_two_ranks_do_what_one_process_does[('--strategy', 'hybrid_zero2'",
    "tests/experiments/launching/test_launch_safety.py::test_over_two_machines_a_run_listens_on_their_network_alone",
    # notebooks, of which every pair holds the same cells
    "tests/experiments/test_notebooks.py::test_notebook_runs[1",
    "tests/experiments/test_notebooks.py::test_notebook_runs[2",
    "tests/experiments/test_notebooks.py::test_notebook_runs[3",
    "tests/experiments/test_notebooks.py::test_notebook_runs[4",
    "tests/experiments/test_notebooks.py::test_notebook_runs[5",
)
# Files that take longest: they come first, or a worker would play the last of them alone.
LONGEST = (
    "tests/experiments/finetuning/test_soak.py",
    "tests/lumina_fn/disk/test_compile_cache.py",
    "tests/lumina_fn/test_sharding.py",
    "tests/test_pages.py",
    "tests/lumina_fn/costs/test_footprint.py",
    "tests/experiments/launching/test_launch.py",
    "tests/experiments/launching/test_guard.py",
    "tests/experiments/launching/test_launch_safety.py",
    "tests/experiments/finetuning/test_resume.py",
    "tests/experiments/pretokenizing/test_pretokenize.py",
    "tests/kernels/test_bench.py",
    "tests/lumina_fn/state/test_saved_state.py",
    "tests/experiments/test_notebooks.py",
    "tests/lumina_fn/test_train.py",
    "tests/experiments/finetuning/test_finetune.py",
    "tests/experiments/finetuning/test_feature_folders.py",
    "tests/lumina_fn/test_export.py",
    "tests/experiments/planning/test_plan.py",
    "tests/experiments/planning/test_memory.py",
    "tests/bench/test_bench.py",
    "tests/lumina_fn/state/test_damage.py",
    "tests/test_wheel.py",
    "tests/experiments/test_main.py",
)
TOGETHER = ("tests/test_pages.py::test_block_runs[docs/",)  # a page's blocks build on each other: a unit is a page


def unit(nodeid: str) -> str | None:
    """What is played or left out as a whole; None for a test that is no sweep."""
    if nodeid.startswith(TOGETHER):
        return nodeid.rpartition(":")[0]
    return nodeid if nodeid.startswith(SWEEPS) else None


def chosen(units: set[str], seed: int) -> set[str]:
    """Every PARTS-th of them; which, the seed says. All seeds below PARTS together choose each once."""
    order = sorted(units, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(order[seed % PARTS :: PARTS])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", default="all", help=f"sweeps: all, or a number: its remainder by {PARTS} is the part")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.nodeid.partition("::")[0], len(first)))
    if config.option.sweep == "all":
        return
    played = chosen({name for item in items if (name := unit(item.nodeid))}, int(config.option.sweep))
    left = [item for item in items if (name := unit(item.nodeid)) and name not in played]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.option.sweep != "all":
        part = int(config.option.sweep) % PARTS
        terminalreporter.write_line(
            f"sweeps: part {part} of {PARTS} was played; `make test SWEEP={part}` plays it again, `make test-all` plays all"
        )
