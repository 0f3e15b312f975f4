"""What training, recording, searching and distilling cost, beside a usual script and a floor."""
