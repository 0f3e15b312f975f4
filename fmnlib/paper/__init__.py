"""What only the notebooks of the book need: comparisons, ablations, theory, figures, the book."""
