"""How commands print: text, tables, columns, trees; asks for rows and changes none."""
