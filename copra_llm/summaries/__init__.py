"""The READMEs' tables and figures, each a function of the records: Markdown, PNG and SVG."""
