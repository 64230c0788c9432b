"""What runs in the supervisor: it decides when, and runs no application code."""
