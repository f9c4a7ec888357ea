"""Reports: comparisons, studies and inspections as tables, plots and pages."""
