"""What do the records say? Means with 95 % intervals, a module a kind of record.

    records --grouped()--> groups of repetitions --figures--> numbers, which report/ and summaries/ only format

A figure is computed here once, whoever shows it: the page's sections and the READMEs' tables.
"""
