"""Reading files, images and sound."""
