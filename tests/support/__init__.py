"""What the tests share: applications, supervisors, users, servers."""
