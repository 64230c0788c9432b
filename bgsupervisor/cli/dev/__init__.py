"""`bgsupervisor dev`: supervises where that is possible, else runs tasks itself, and prints what they do."""
