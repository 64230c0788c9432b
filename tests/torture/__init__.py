"""The torture test: real processes are killed and stopped at random, from one seed, and the promises checked.

`python -m torture --help` tells the options, docs/reliability.md what is promised and how it is checked. What happened
is told by an oracle, files beside the database that bodies and chaos write; `invariants` compares it with the rows.
"""
