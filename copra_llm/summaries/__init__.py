"""The READMEs' tables and pictures, each a function of the records: Markdown, PNG and SVG."""
