"""Sources of an import: archives, folders and label files of others, read into images with splits and labels."""
