"""Reports: tables, figures and pages from the records of a benchmark."""
