"""What runs in the fork server, in children and in the wait manager; defines no table."""
