"""What a person sees of a run: tables, plots, the HTML page."""
