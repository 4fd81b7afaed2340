"""Instruction data: from files of many shapes to tokens, of which those that the assistant wrote are trained.

    sources -> files -> formats -> records -> templates -> encode -> lengths

`sources.Reader` reads one source, `encode.Encoder` makes tokens of its records, `lengths.fit` cuts or drops the long
ones. Each passes on what is broken as a `records.Broken`; `sources.strict` turns the first of them into an
`InputError`, `check.check` collects them all.
"""
