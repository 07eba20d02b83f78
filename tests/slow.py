"""Tests that take long: `make test-fast` leaves them out."""

FOLDERS = ("dist", "fuzz", "projects")
FILES = (
    "features/test_benchmarks.py", "features/test_cli_probe.py", "features/test_cli_report.py",
    "features/test_cli_sweep.py", "features/test_client_memory.py", "features/test_client_metrics.py",
    "features/test_combinations.py", "features/test_compute_accounting.py", "features/test_compute_besides.py",
    "features/test_copies.py", "features/test_critical_phase.py", "features/test_data.py", "features/test_docs.py",
    "features/test_empty_rounds.py", "features/test_examples.py", "features/test_existing.py",
    "features/test_foreign_objects.py", "features/test_freezing.py", "features/test_hydra_template.py",
    "features/test_hydra_train.py", "features/test_lightning_cli.py", "features/test_max_batch_probe.py",
    "features/test_more_examples.py", "features/test_partition_files.py", "features/test_phase_optimizers.py",
    "features/test_population.py", "features/test_probe_on_any_module.py", "features/test_pytorch_lightning.py",
    "features/test_resume.py", "features/test_robust.py", "features/test_round_memory.py",
    "features/test_run_settings.py", "features/test_scale.py", "features/test_size.py", "features/test_tensorboard.py",
    "features/test_typed.py", "laws/test_executors.py", "laws/test_methods.py", "laws/test_captured_steps.py",
    "unit/test_compressors.py", "unit/test_lightning_suite.py", "unit/test_local_rules.py",
    "unit/test_memory_model.py", "unit/test_phases.py", "unit/test_privacy.py",
    "unit/test_pytorch_lightning.py", "unit/test_scaling_fit.py", "unit/test_scaling_tables.py",
    "unit/test_states.py", "unit/test_verdicts.py", "unit/test_verify.py",
)  # fmt: skip
"""Files of more than ten seconds on one core, below tests/; measured by `pytest --durations=0`."""
