"""The mathematics, free of devices, files and flags."""
