"""One file a kind of record: records in, a section of the page out, or None where there are none."""
