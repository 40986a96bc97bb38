"""COCO-format data sets in, batches of samples out."""
