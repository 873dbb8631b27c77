"""The quick part of the tests, for pytest as a plugin (`make quick`): of each test function one case, and none of SLOW.

Which case is drawn by the function's name, so that functions which run over the same families take different ones.
"""

import zlib

import pytest

# Test functions of more than about a second, or with such a fixture; `make test` lists the slowest.
SLOW = {
    "test_a_compiled_model",
    "test_a_hostile_file_ends_in_one_short_line_within_a_second_and_200_mb",
    "test_a_killed_search_goes_on",
    "test_a_progress_bar_is_not_written_into_a_pipe",
    "test_a_run_killed_at_half_goes_on_and_gives_the_same_bytes",
    "test_a_search_is_the_same_twice_and_validated",
    "test_a_window_that_the_implementation_does_not_show",
    "test_attention_can_be_chosen",
    "test_damaged_records_are_made_again",
    "test_eight_threads_with_fifty_requests_each_answer_as_alone",
    "test_evaluate_writes_results_with_dense_always",
    "test_every_figure_is_what_counting_gives",
    "test_every_fit_runs",
    "test_extra_megabytes_at_2880_tokens_and_32_heads",
    "test_fitprune_does_not_import_the_kernels",
    "test_images_are_numbered_as_features_are_dealt",
    "test_importing_every_module_changes_nothing_in_transformers",
    "test_it_trains_with_gradient_checkpointing_as_without",
    "test_memory_does_not_grow_with_the_number_of_samples",
    "test_memory_stays_below_one_and_a_half_times_the_largest_shard",
    "test_nothing_is_registered_before_it_is_asked_for",
    "test_on_the_command_line",
    "test_random_depends_on_seed_and_prompt_alone",
    "test_recipes_from_their_files_give_what_the_methods_give",
    "test_several_budgets_share_the_answers",
    "test_statistics_are_held_once",
    "test_statistics_do_not_depend_on_how_a_mask_is_shown",
    "test_ten_budgets_on_statistics_of_full_size",
    "test_the_commands_on_the_embedded_model",
    "test_the_highest_scores_stay_and_of_equal_ones_the_later",
    "test_the_kernels_compile_for_gpus",
    "test_the_kernels_give_what_blocks_give",
    "test_the_report_needs_nothing_else_and_tells_everything",
    "test_the_trained_model_equals_the_oracle_on_real_images",
    "test_two_processes_give_the_same_bytes",
    "test_two_processes_write_the_file_of_one",
    "test_two_runs_give_the_same_bytes",
    "test_unusual_but_sound_images_are_read",
    "test_ways_to_decode_agree_beyond_every_window",
    "test_what_a_killed_process_leaves_is_gone_on_with_by_any_number_of_processes",
    "test_what_stays_in_any_layout",
    "test_where_triton_cannot_compile_blocks_are_used_and_that_is_told",
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    cases = {}
    for item in items:
        cases.setdefault((item.path, item.originalname), []).append(item)
    chosen = {
        each[zlib.crc32(name.encode()) % len(each)].nodeid for (_, name), each in cases.items() if name not in SLOW
    }
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]
