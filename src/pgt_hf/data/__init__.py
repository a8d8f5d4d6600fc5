"""Data as people have it, for images and texts: splits and labels, files of rows, and the workers that read."""
