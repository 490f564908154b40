"""Reading and writing georeferenced rasters. Nothing outside this package knows what a CRS is."""
