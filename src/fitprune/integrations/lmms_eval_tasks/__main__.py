"""Print the folder of the tasks, for `lmms-eval --include_path`."""

from fitprune.integrations.lmms_eval_tasks import folder

print(folder())
