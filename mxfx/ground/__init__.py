"""What every room stands on: errors, nearest names, whole-file writes, progress bars."""
