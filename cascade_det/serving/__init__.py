"""A web page that shows what a detector finds, and how exits change it."""
