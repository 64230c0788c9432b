"""The only writer of rows: requests, transitions, parts, locks, barriers; sends no signal and knows no process."""
