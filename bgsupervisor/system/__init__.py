"""Linux: processes, files, logs, signals; knows no task."""
