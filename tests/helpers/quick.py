"""The quick part of the tests, for pytest as a plugin (`make quick`): of each test function one case, and none of SLOW.

Which case is drawn by the function's name, so that functions which run over the same families take different ones.
"""

import zlib

import pytest

# Test functions, and files, that take a second or more, or their fixtures do; `make test` lists the slowest.
SLOW = {
    "test_triton_kernels.py",
    "test_a_checkpoint_that_is_quantized_already_needs_no_option",
    "test_a_compiled_model",
    "test_a_datasets_folder_and_the_jsonl_loader_read_the_bundled_questions",
    "test_a_device_map_keeps_the_towers_together",
    "test_a_full_disk_half_way_through_a_file_leaves_the_old_one",
    "test_a_hostile_file_ends_in_one_short_line_within_a_second_and_200_mb",
    "test_a_journal_of_images_of_another_shape_or_made_ready_otherwise_is_refused",
    "test_a_killed_search_goes_on",
    "test_a_model_inside_of_peft_generates_pruned",
    "test_a_number_out_of_range_is_refused_before_anything_of_its_size_is_made",
    "test_a_packages_broken_row_is_named",
    "test_a_progress_bar_is_not_written_into_a_pipe",
    "test_a_quick_demo_ends_in_a_page_whose_path_is_the_last_line",
    "test_a_recipe_and_its_card_are_pushed",
    "test_a_recipe_goes_to_the_hub_and_comes_back",
    "test_a_run_killed_at_half_goes_on_and_gives_the_same_bytes",
    "test_a_run_killed_in_the_middle_goes_on_and_gives_the_same_bytes",
    "test_a_run_writes_answers_that_score_as_its_results_say",
    "test_a_search_is_the_same_twice_and_validated",
    "test_a_window_that_the_implementation_does_not_show",
    "test_a_winner_that_validation_refutes_is_not_returned",
    "test_agreement_needs_no_answers",
    "test_all_leaves_out_methods_of_a_package_that_cannot_be_imported",
    "test_an_all_keep_recipe_is_bit_identical_to_the_quantized_model",
    "test_an_example_runs_in_another_folder",
    "test_an_installed_package_brings_one_to_every_process",
    "test_an_installed_packages_family_is_loaded_pruned_and_listed",
    "test_any_budget_any_shape",
    "test_any_budget_is_met_and_the_model_is_left_alone",
    "test_assisted_decoding_equals_greedy",
    "test_assisted_decoding_equals_plain_greedy",
    "test_attention_can_be_chosen",
    "test_budgets_live_on_branches",
    "test_damaged_records_are_made_again",
    "test_dense_prefill_flops_and_kv_bytes_are_those_that_run",
    "test_divergences_are_those_of_whole_calls",
    "test_drafts_behind_right_padding",
    "test_eight_threads_with_fifty_requests_each_answer_as_alone",
    "test_evaluate_writes_results_with_dense_always",
    "test_every_figure_is_what_counting_gives",
    "test_every_fit_runs",
    "test_every_picture_is_a_png_and_an_svg_without_a_date",
    "test_every_row_is_a_sample_with_the_same_bytes_through_parts",
    "test_every_step_of_the_command_line_takes_it",
    "test_extra_megabytes_at_2880_tokens_and_32_heads",
    "test_flex_attention_keeps_the_tokens_of_sdpa",
    "test_gemma3_computes_all_pairs_but_holds_no_more_than_its_window",
    "test_help_of_every_command_is_quick_and_shows_an_example",
    "test_images_are_numbered_as_features_are_dealt",
    "test_importing_every_module_changes_nothing_in_transformers",
    "test_it_trains_with_gradient_checkpointing_as_without",
    "test_it_works_whatever_is_missing_or_broken",
    "test_memory_does_not_grow_with_the_number_of_samples",
    "test_memory_stays_below_one_and_a_half_times_the_largest_shard",
    "test_merging_statistics_of_full_size",
    "test_methods_that_need_no_statistics_run_without",
    "test_model_processor_and_recipe_come_from_one_commit",
    "test_most_figures_are_above_nothing",
    "test_no_score_makes_a_tensor_of_rows_keys_and_heads",
    "test_nothing_is_registered_before_it_is_asked_for",
    "test_on_the_command_line",
    "test_random_depends_on_seed_and_prompt_alone",
    "test_recipes_from_their_files_give_what_the_methods_give",
    "test_several_budgets_share_the_answers",
    "test_several_threads_call_one_pruned_model",
    "test_skip_bad_leaves_out_what_the_processor_refuses",
    "test_statistics_are_held_once",
    "test_statistics_are_used_again_only_for_the_same_model_and_data",
    "test_statistics_do_not_depend_on_how_a_mask_is_shown",
    "test_statistics_of_full_size_are_analysed_in_bounded_memory",
    "test_ten_budgets_on_statistics_of_full_size",
    "test_the_command_line_finds_an_installed_packages_scorer",
    "test_the_command_line_finds_the_recipe_beside_the_model",
    "test_the_command_writes_all_and_prints_the_findings",
    "test_the_commands_on_the_embedded_model",
    "test_the_example_ranks_otherwise_and_keeps_as_many",
    "test_the_highest_scores_stay_and_of_equal_ones_the_later",
    "test_the_report_needs_nothing_else_and_tells_everything",
    "test_the_same_statistics_give_the_same_bytes",
    "test_the_sequential_fit_weighs_samples_of_different_size_by_their_shares",
    "test_the_table_says_where_fitprune_is_not_the_best",
    "test_the_trained_model_equals_the_oracle_on_real_images",
    "test_turns_in_any_order_of_text_and_images",
    "test_two_processes_give_the_same_bytes",
    "test_two_processes_write_the_file_of_one",
    "test_two_runs_give_the_same_bytes",
    "test_unusual_but_sound_images_are_read",
    "test_ways_to_decode_agree_beyond_every_window",
    "test_what_a_killed_process_leaves_is_gone_on_with_by_any_number_of_processes",
    "test_what_cannot_be_said_is_left_out_with_a_note",
    "test_what_stays_in_any_layout",
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    cases = {}
    for item in items:
        if not SLOW & {item.path.name, item.originalname}:
            cases.setdefault((item.path, item.originalname), []).append(item)
    chosen = [each[zlib.crc32(name.encode()) % len(each)] for (_, name), each in cases.items()]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
