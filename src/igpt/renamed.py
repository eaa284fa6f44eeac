"""Settings that had another name in older releases: a command that has it is told, a record that has it is read."""

RENAMED = {"task.gen": "task.loss_weights.gen", "task.clf": "task.loss_weights.clf"}
