"""Masks of objects: polygons, RLE and bitmaps, as targets of a mask head and pasted into images."""
