"""Results as text, tables, plots and pictures with boxes."""
