"""natgrad's workbench: trainer, data, models, recipes, comparison, planner, report and the command line.

The library does not need it.
"""
