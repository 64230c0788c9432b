"""How rows are reached: tables, connections, dialects, migrations; makes no transition."""
