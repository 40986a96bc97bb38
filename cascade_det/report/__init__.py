"""Results shown: text, tables, plots, pictures with boxes."""
