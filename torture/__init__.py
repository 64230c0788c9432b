"""The torture test: real supervisors, children, nurseries and boards are killed and stopped at random, from one seed.

`python -m torture --help` tells the options, docs/reliability.md what is promised and how it is checked. What happened
is told by an oracle, files beside the database that bodies and chaos write; `invariants` compares it with the rows.
"""
