"""Publishing a data set or a student: chosen by an allow-list, scanned, judged, shown, and only then sent."""
