"""What do the records say? Means with 95 % intervals, a module a kind of record.

    records -> groups of repetitions (groups.py) -> numbers, which `report` and `summaries` only format

A figure is computed here once, whoever shows it: a section of the page, a table or a picture of a README.
"""
