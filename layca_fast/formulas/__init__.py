"""What is computed for an element and for a layer, the table of bases, and the options that they take."""
