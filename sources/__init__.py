"""Where images come from: data sets, photographs and drawings."""
